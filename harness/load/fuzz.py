"""Requests that nobody would send, to the real reward service: none gets 5xx, and each the answer that is documented.

Four parts. `schema`: schemathesis makes requests from the service's own OpenAPI document, such as it allows and such
as it forbids; an answer must have a status, a content type and a shape that the document names. `texts`: rewards of
empty texts, halves of surrogate pairs, NULs, a million times one letter, anything Unicode has; the answer must be the
one that docs/reference/wire.md promises. `bytes`: bodies that are damaged or no documents at all, on every route that
takes one. `framing`: connections whose bytes two servers may read differently (`hostile_requests`); each request is
refused and its connection closed, or answered once (`hostile_framing`). Half of all requests are of this part.
"""

import asyncio
import http.client
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import msgpack
import requests
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from harness.load.hostile_framing import besiege
from harness.load.hostile_requests import FUZZ_KEY
from harness.load.rewards import some_texts
from plaudit import wire

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
RELOAD_SHARE = 0.002
"""A reload reads the model anew; more of them would leave no time for anything else."""
CHUNK = 5000
"""Requests made of one pool of values, or before the next operation has its turn."""
POOL = 1000
KEY = {"Authorization": f"Bearer {FUZZ_KEY}"}
MSGPACK = "application/msgpack"
Refusal = tuple[int, str, int | None]
MALFORMED: Refusal = (400, "malformed-body", None)
EXAMPLES: dict[str, dict[str, Any]] = {
    wire.REWARDS_PATH: {"items": [{"prompt": "This movie", "response": " was wonderful."}], "label": "POSITIVE"},
    "/predict": {"inputs": [["A wonderful movie."], ["Was it good?", "Dreadful."]], "raw_scores": True},
    "/": {"inputs": "A wonderful movie.", "parameters": {"function_to_apply": "none"}},
    "/classify": {"input": ["A wonderful movie."], "use_activation": False},
    "/infinity/classify": {"input": ["A wonderful movie."], "raw_scores": True},
    "/pooling": {"input": ["A wonderful movie."], "encoding_format": "base64"},
    "/get_reward": {"query": ["This movie was wonderful."]},
    "/v2/models/reward/infer": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["A wonderful movie."]}]
    },
}
"""A good body for every route that takes one, to be damaged."""


class Answer(NamedTuple):
    """What came back for one request."""

    status: int
    body: bytes


@dataclass
class Tally:
    """How many requests were sent, how they were answered, and what was wrong with an answer."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        return self.statuses.total()

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500 and status != 501)

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        lines = [f"{self.sent} requests in {self.seconds:.0f} s: {statuses}; {self.server_errors} of 5xx"]
        lines += [f"  WRONG {count} x {what}" for what, count in self.wrong.most_common(20)]
        return "\n".join(lines)


class Connection:
    """A kept connection that gives the whole answer, whatever was sent."""

    def __init__(self, url: str, tally: Tally) -> None:
        self._http = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._tally = tally

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        self._http.request("POST", path, body, headers)
        response = self._http.getresponse()
        answer = Answer(response.status, response.read())
        self._tally.statuses[answer.status] += 1
        return answer

    def close(self) -> None:
        self._http.close()


def generated(test: Callable[..., None], count: int, seed: int, **strategies: st.SearchStrategy[Any]) -> None:
    """Call `test` with `count` examples, or as many as there are. Nothing is stored, shrunk or stopped at."""
    every = hypothesis.given(**strategies)(test)
    settled = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )(every)
    hypothesis.seed(seed)(settled)()


@contextmanager
def timed(tally: Tally) -> Iterator[None]:
    began = time.perf_counter()
    yield
    tally.seconds += time.perf_counter() - began


def by_schema(url: str, count: int, seed: int) -> Tally:
    """Requests from the OpenAPI document, valid and invalid, on every operation in turn."""
    tally = Tally()
    schemathesis.serializer(MSGPACK)(lambda context, value: _packed(value))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    reloads = math.ceil(count * RELOAD_SHARE)
    session = requests.Session()
    turn = 0
    with timed(tally):
        while tally.sent < count:
            for operation in operations:
                share = min(CHUNK, math.ceil((count - tally.sent) / len(operations)))
                if operation.path.endswith(":reload"):
                    share = min(share, reloads)
                    reloads -= share
                for mode in GenerationMode:
                    turn += 1
                    if share > 0 and tally.sent < count:
                        _generate_cases(operation, mode, session, tally, max(1, share // 2), seed + turn)
    return tally


def _generate_cases(
    operation: Any, mode: GenerationMode, session: requests.Session, tally: Tally, count: int, seed: int
) -> None:
    def send(case: Case[Any]) -> None:
        response = case.call(session=session)
        tally.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                what = re.sub(r"\s+", " ", str(failure))[:300]
                tally.wrong[f"{operation.label} {response.status_code} {what}"] += 1

    # Where nothing can be wrong with a request, there is no such example.
    with suppress(hypothesis.errors.Unsatisfiable):
        generated(send, count, seed, case=operation.as_strategy(generation_mode=mode))


def _packed(value: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass", default=str)
    except OverflowError:
        return b"\xc1"  # an integer that msgpack has no room for; this byte means nothing to it
    return packed


def texts() -> st.SearchStrategy[str]:
    """Texts of any kind, the unpleasant ones more often."""
    anything = st.text(st.characters(exclude_categories=()))
    unpleasant = st.sampled_from(["", "\0", "\0" * 500, "\ud800", "\udfff tail", "\ud83d\ude00", "\ufeff", "\u202e"])
    letter = st.characters(exclude_categories=["Cs"])
    counts = st.sampled_from([0, 1, 60, 255, 256, 257, 511, 512, 2048, 17_000])
    long = st.builds(lambda one, many: one * many, letter, counts)
    scripts = st.text(st.sampled_from("aéßжあ字ก한שع🎬👩‍👩‍👧‍👧\u0301\u200d\u00ad"), max_size=300)
    return st.one_of(anything, anything, unpleasant, scripts, long)


def pool(strategy: st.SearchStrategy[Any], seed: int) -> list[Any]:
    """So many values of a kind, to be put together at random: cheaper than to have each request made afresh."""
    values: list[Any] = []

    def keep(value: Any) -> None:
        values.append(value)

    generated(keep, POOL, seed, value=strategy)
    return values


def by_texts(url: str, count: int, seed: int) -> Tally:
    """Rewards for texts of every kind, in JSON (escaped or not) and msgpack."""
    tally = Tally()
    connection = Connection(url, tally)
    draw = random.Random(seed)
    with timed(tally):
        for letter in "a\0字":
            _send_texts(connection, [{"prompt": letter * wire.MAX_TEXT_CHARS, "response": "x"}], "raw", tally)
            too_long = [{"prompt": "x", "response": letter * (wire.MAX_TEXT_CHARS + 1)}]
            _send_texts(connection, too_long, "raw", tally)
        while tally.sent < count:
            some = pool(texts(), draw.randrange(2**32))
            for _ in range(min(CHUNK, count - tally.sent)):
                items = [
                    dict(zip(("prompt", "response"), draw.choices(some, k=2), strict=True))
                    for _ in range(draw.randint(0, 3))
                ]
                _send_texts(connection, items, draw.choice(["escaped", "raw", "msgpack"]), tally)
    connection.close()
    return tally


def _send_texts(connection: Connection, items: list[dict[str, str]], form: str, tally: Tally) -> None:
    body = {"items": items, "label": "POSITIVE"}
    kind = MSGPACK if form == "msgpack" else "application/json"
    if form == "msgpack":
        data = _packed(body)
    else:
        data = json.dumps(body, ensure_ascii=form == "escaped").encode(errors="surrogatepass")
    headers = {"content-type": kind, "accept": "application/json"}
    answer = connection.post(wire.REWARDS_PATH, data, headers)
    wrong = _wrong_with(answer, items, form)
    if wrong is not None:
        tally.wrong[f"{form} {wrong}"] += 1


def _wrong_with(answer: Answer, items: list[dict[str, str]], form: str) -> str | None:
    """What docs/reference/wire.md doesn't promise of the answer, if anything."""
    if form == "escaped":
        # Two escapes that are a pair come out as one character.
        items = json.loads(json.dumps(items))
    whole = [all(map(_is_text, item.values())) for item in items]
    got = json.loads(answer.body)
    half: Refusal | None = None if all(whole) else (422, "invalid-request", whole.index(False))
    if not items:
        wanted: list[Refusal] = [(422, "empty-items", None)]
    elif half is not None:
        # Only an escape can hold half a pair; as bytes it is no UTF-8, and so no JSON either.
        wanted = {"escaped": [half], "raw": [half, MALFORMED], "msgpack": [MALFORMED]}[form]
    elif any(len(text) > wire.MAX_TEXT_CHARS for item in items for text in item.values()):
        wanted = [(422, "text-too-long", 0)]
    else:
        rewards = got.get("rewards", [])
        fine = answer.status == 200 and len(rewards) == len(items) and all(map(math.isfinite, rewards))
        return None if fine else f"no {len(items)} rewards but {answer.status} {_kind(got)}"
    seen = (answer.status, got.get("type", "").rpartition(":")[2], got.get("item"))
    return None if seen in wanted else f"{seen}, not {wanted}"


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _kind(document: Any) -> str:
    return str(document.get("type", document)) if isinstance(document, dict) else str(document)[:100]


def by_bytes(url: str, count: int, seed: int) -> Tally:
    """Damaged bodies and no bodies, on every route that takes one: nothing but 2xx and 4xx, each a whole document."""
    tally = Tally()
    connection = Connection(url, tally)
    draw = random.Random(seed)
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    with timed(tally):
        while tally.sent < count:
            values = pool(anything, draw.randrange(2**32))
            for _ in range(min(CHUNK, count - tally.sent)):
                path = draw.choice(list(EXAMPLES))
                headers = {
                    "content-type": draw.choice(["application/json", "application/json", MSGPACK, "text/plain", ""]),
                    "x-request-timeout": draw.choice(["60", "60", "60", "nan", "-1", "soon", "1e999"]),
                }
                if path.startswith("/v2") and draw.random() < 0.5:
                    lengths = ["0", "5", "140", "-1", "99999999999", "x"]
                    headers["inference-header-content-length"] = draw.choice(lengths)
                answer = connection.post(path, _any_body(draw, EXAMPLES[path], values), headers)
                if answer.status >= 500 or not (headers["content-type"] == MSGPACK or _is_json(answer.body)):
                    tally.wrong[f"{path} {answer.status} {answer.body[:200]!r}"] += 1
    connection.close()
    return tally


def _any_body(draw: random.Random, example: dict[str, Any], values: list[Any]) -> bytes:
    """Bytes of no meaning; the example, damaged or with a member of any kind; any value, as JSON or msgpack."""
    value = draw.choice(values)
    match draw.randrange(6):
        case 0:
            return draw.randbytes(draw.randrange(64))
        case 1:
            return _damaged(json.dumps(example).encode() if draw.random() < 0.7 else _packed(example), draw)
        case 2:
            name = draw.choice([*example, "parameters", "text", "raw_scores", "label"])
            return json.dumps(example | {name: value}).encode()
        case 3:
            return json.dumps(value).encode()
        case 4:
            return _packed(value)
        case _:
            return draw.choice([b"[", b'{"a":', b"\x91"]) * draw.choice([10, 1000, 50_000])


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _damaged(body: bytes, draw: random.Random) -> bytes:
    """Some bytes of it changed, cut out or doubled."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        piece = draw.choice([b"", body[at : at + draw.randint(1, 9)] * 2, bytes([draw.randrange(256)])])
        body = body[:at] + piece + body[at + draw.randint(0, 3) :]
    return body


def by_framing(url: str, count: int, seed: int) -> Tally:
    """Connections with requests that two servers may read differently; needs a service with the key `FUZZ_KEY`."""
    tally = Tally()
    rewards = known_rewards(url)

    def record(status: int, wrong: str | None) -> None:
        tally.statuses[status] += 1
        if wrong is not None:
            tally.wrong[wrong] += 1

    with timed(tally):
        asyncio.run(besiege(int(url.rpartition(":")[2]), count, seed, rewards, record))
    if run := counted_by_the_service(url, "route").get(wire.MODEL_PATH):
        tally.wrong[f"a hidden request was run {run} times, by the service's own count"] += 1
    return tally


def known_rewards(url: str) -> dict[str, float]:
    """The rewards of some texts, by an ordinary request."""
    some = sorted(set(some_texts(100)))
    body: Any = {"items": [{"prompt": text, "response": ""} for text in some], "label": "POSITIVE"}
    answer = requests.post(f"{url}{wire.REWARDS_PATH}", json=body, headers=KEY, timeout=60)
    answer.raise_for_status()
    return dict(zip(some, answer.json()["rewards"], strict=True))


def counted_by_the_service(url: str, by: str = "status") -> Counter[str]:
    """The service's own count of its answers, by `status` or `route`."""
    counts: Counter[str] = Counter()
    text = requests.get(f"{url}/metrics", headers=KEY, timeout=60).text
    for label, count in re.findall(rf'plaudit_reward_responses_total\{{.*{by}="([^"]*)".*\}} (\S+)', text):
        counts[label] += int(float(count))
    return counts


class Part(NamedTuple):
    """Some of the requests."""

    send: Callable[[str, int, int], Tally]
    share: float
    """Of all requests."""
    keyed: bool = False
    """Whether the service must have the key."""


PARTS = {
    "schema": Part(by_schema, 0.05),
    "texts": Part(by_texts, 0.2),
    "bytes": Part(by_bytes, 0.25),
    "framing": Part(by_framing, 0.5, keyed=True),
}
