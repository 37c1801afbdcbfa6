"""A reward server that misbehaves on command, in a process of its own; standard library and raw sockets only.

Its reward is a function of the text, so a lost, repeated or reordered reward shows. `python -m
harness.stub_reward_server` prints one line of JSON with its ports when it listens; `StubRewardServer` starts, scripts,
kills and restarts it.

Script: a list of acts, one for each coming scoring request, each `{"do": NAME, "times": N, ...}`; afterwards it answers
well. An act with `when` is kept for requests that contain this text. `score` (delay_s), `status` (status, headers,
body), `hang` (before a byte, or `after` N bytes of the body), `drip` (delay_s a byte), `reset`, `wrong_count`,
`reversed`, `literal` (text in place of the first reward), `revision`, `label`, `html`, `redirect` (location),
`truncated_gzip`, `cut` (a body shorter than its Content-Length), `flood` (a body that never ends).

The texts by which a client checks the order of the rewards are always answered well and not counted among the requests,
except by acts with `probes`.
"""

import argparse
import asyncio
import gzip
import hashlib
import http
import json
import ssl
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.processes import Program

MODEL = "stub"
REVISION = "sha256:stub"
LABELS = ["NEGATIVE", "POSITIVE"]
PROBES = {"The film", "I", "This is"}
"""The prompts of `plaudit.rewards.source.ORDER_PROBES`."""


def stub_reward(prompt: str, response: str) -> float:
    """In [-1, 1), another one for every text."""
    digest = hashlib.sha256(f"{prompt}\x00{response}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**31 - 1


def stub_reward_of(item: dict[str, Any]) -> float:
    """Of an item of the wire: another one for every prompt, conversation, response and fields."""
    prompt, fields = item["prompt"], item.get("fields")
    if isinstance(prompt, str) and not fields:
        return stub_reward(prompt, item["response"])
    return stub_reward(json.dumps([prompt, fields or {}], sort_keys=True), item["response"])


@dataclass
class State:
    script: list[dict[str, Any]] = field(default_factory=list)
    ready: bool = True
    revision: str = REVISION
    probes: int = 0
    requests: int = 0
    largest_request: int = 0
    scored: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    """What `/v1/model` says beside or in place of the usual."""
    last_request: dict[str, Any] = field(default_factory=dict)
    in_flight: int = 0
    max_in_flight: int = 0

    def next_act(self, body: str) -> dict[str, Any]:
        for act in self.script:
            left = act.get("times", 1)
            if left > 0 and act.get("when", "") in body:
                act["times"] = left - 1
                return act
        return {"do": "score"}


async def serve_rewards(state: State, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while (request := await read_request(reader)) is not None:
            method, path, headers, body = request
            state.headers = headers
            if (method, path) == ("POST", "/v1/rewards"):
                await reward(state, json.loads(body) | asked_by(headers), writer)
            elif path == "/livez" or (path == "/readyz" and state.ready):
                await respond(writer, 200, b"{}")
            elif path == "/readyz":
                await respond(writer, 503, b'{"detail": "loading"}')
            elif path == "/v1/model":
                await respond(writer, 200, json.dumps(model_info(state) | asked_by(headers)).encode())
            else:
                await respond(writer, 404, b'{"detail": "no such path"}')
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


def asked_by(headers: dict[str, str]) -> dict[str, str]:
    """The request's id, which is told to whoever sends one."""
    return {"request_id": headers["plaudit-request-id"]} if "plaudit-request-id" in headers else {}


async def reward(state: State, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    if all(str(item["prompt"]) in PROBES for item in request["items"]):
        state.probes += 1
        act = next((act for act in state.script if act.get("probes")), {"do": "score"})
        await act_out(State(revision=state.revision), act, request, writer)
        return
    state.requests += 1
    state.in_flight += 1
    state.max_in_flight = max(state.max_in_flight, state.in_flight)
    try:
        await act_out(state, state.next_act(json.dumps(request)), request, writer)
    finally:
        state.in_flight -= 1


def model_info(state: State) -> dict[str, Any]:
    limits = {"max_items": 64, "max_text_chars": 100_000, "max_body_bytes": 10_000_000, "max_tokens": 512}
    usual = {"id": MODEL, "revision": state.revision, "labels": LABELS, "default_label": "POSITIVE", "limits": limits}
    return usual | state.info


async def act_out(state: State, act: dict[str, Any], request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    items = [(item["prompt"], item["response"]) for item in request["items"]]
    state.last_request = {name: value for name, value in request.items() if name != "request_id"}
    state.largest_request = max(state.largest_request, len(items))
    answer: dict[str, Any] = {
        "rewards": [stub_reward_of(item) for item in request["items"]],
        "model": MODEL,
        "revision": state.revision,
        "label": request.get("label") or "POSITIVE",
    }
    if "request_id" in request:
        answer["request_id"] = request["request_id"]
    do = act["do"]
    await asyncio.sleep(act.get("delay_s", 0) if do != "drip" else 0)
    if do == "status":
        await respond(writer, act["status"], act.get("body", "").encode(), act.get("headers", {}))
        return
    if do == "html":
        await respond(writer, 200, b"<html><h1>Sign in</h1></html>", {"Content-Type": "text/html"})
        return
    if do == "flood":
        await respond(writer, act.get("status", 200), b"[", length=2**40)
        while True:
            writer.write(b" " * 2**16)
            await writer.drain()
    if do == "redirect":
        await respond(writer, 307, b"", {"Location": act["location"]})
        return
    if do == "reset":
        writer.transport.abort()
        return
    if do == "wrong_count":
        answer["rewards"].pop()
    if do == "reversed":
        answer["rewards"].reverse()
    if do in ("revision", "label"):
        answer[do] = act[do]
    body = json.dumps(answer).encode()
    if do == "literal":
        body = body.replace(json.dumps(answer["rewards"][0]).encode(), act["text"].encode(), 1)
    if do == "hang":
        if "after" in act:
            await respond(writer, 200, body[: act["after"]], length=len(body))
        await asyncio.Event().wait()
    if do == "drip":
        await respond(writer, 200, b"", length=len(body))
        for byte in body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(act["delay_s"])
    elif do == "cut":
        await respond(writer, 200, body[: len(body) // 2], length=len(body))
        writer.close()
        return
    elif do == "truncated_gzip":
        packed = gzip.compress(body)
        await respond(writer, 200, packed[: len(packed) // 2], {"Content-Encoding": "gzip"})
        return
    else:
        await respond(writer, 200, body)
    for prompt, response in items:
        key = f"{prompt}|{response}"
        state.scored[key] = state.scored.get(key, 0) + 1


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = first.split(" ")
    return method, path, headers, body


async def respond(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:
    head = {"Content-Type": "application/json", "Content-Length": str(len(body) if length is None else length)}
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (head | (headers or {})).items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
    await writer.drain()


async def serve_control(state: State, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = await read_request(reader)
    if request is not None:
        method, _, _, body = request
        if method == "POST":
            for name, value in json.loads(body).items():
                setattr(state, name, value)
        await respond(writer, 200, json.dumps(vars(state)).encode(), {"Connection": "close"})
    writer.close()


async def main(host: str, port: int, tls: list[str]) -> None:
    state = State()
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
    public = await asyncio.start_server(lambda r, w: serve_rewards(state, r, w), host, port, ssl=context)
    control = await asyncio.start_server(lambda r, w: serve_control(state, r, w), host, 0)
    print(json.dumps([server.sockets[0].getsockname()[1] for server in (public, control)]), flush=True)
    await asyncio.Event().wait()


class StubRewardServer(Program):
    """The server's process, seen from a test. It listens when it is made."""

    def __init__(self, *tls: Path, host: str = "127.0.0.1", wrapper: tuple[str, ...] = ()) -> None:
        """`tls`: the files of a certificate and its key, to speak https. `wrapper`: a command to run it under."""
        super().__init__(directory=Path(__file__).parents[1])
        self._before = [*wrapper, sys.executable, "-m", "harness.stub_reward_server", "--host", host]
        self._tls = [str(file.resolve()) for file in tls]
        self._address = f"[{host}]" if ":" in host else host
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._address}:{self.port}"

    def start(self) -> None:
        """Start, on the same port as before if there was one; returns when it listens."""
        self.command = [*self._before, "--port", str(self.port), "--tls", *self._tls]
        self.begin()
        self.port, self._control_port = json.loads(self.next_line())

    def script(self, acts: list[dict[str, Any]]) -> None:
        """What to do with the coming scoring requests, in order."""
        self.set(script=acts)

    def set(self, **values: Any) -> None:
        self._control("POST", values)

    def reset(self) -> None:
        """As if just started."""
        if self.running:
            self.set(**vars(State()))
        else:
            self.start()

    @property
    def state(self) -> dict[str, Any]:
        """What it has seen and answered so far (fields of `State`)."""
        return self._control("GET", None)

    def _control(self, method: str, values: dict[str, Any] | None) -> dict[str, Any]:
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(f"http://{self._address}:{self._control_port}/", data=data, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            state: dict[str, Any] = json.loads(response.read())
            return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--tls", nargs="*", default=[])
    arguments = parser.parse_args()
    asyncio.run(main(arguments.host, arguments.port, arguments.tls))
