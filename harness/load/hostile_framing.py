"""Sends `hostile_requests` to the reward service, and says whether what comes back is right.

- `before` gets its rewards, even where it was sent together with a refused request.
- `hostile` is refused with 4xx or 501 and the connection closed, or answered once: with its rewards, or with the status
  that its target, method, key and body call for. Its `Meaning` says which of the two it must be.
- `behind` gets its rewards once if `hostile` was answered and the connection stays open, and nothing otherwise.
- `hidden` is never answered, nothing is answered twice, and no answer is 5xx but 501.
- The connection ends. It is given `HANG_S`.
"""

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness.load.hostile_requests import ANY, EITHER, REFUSALS, REFUSED, SERVED, UNFINISHED, Exchange, exchange

HANG_S = 60.0
SILENT_S = 0.3
"""How long the service may be silent before a client that has sent only a part closes its side."""
AT_ONCE = 16
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    """One whole answer of the service."""

    status: int
    request_id: str | None
    closes: bool
    body: bytes


@dataclass
class Seen:
    """What came back on a connection."""

    received: bytearray = field(default_factory=bytearray)
    reset: bool = False
    hung: bool = False


async def carried_out(port: int, wanted: Exchange) -> Seen:
    """Send it, and take in what comes until the connection ends."""
    seen = Seen()
    try:
        async with asyncio.timeout(HANG_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await _talk(reader, writer, wanted, seen)
            except (ConnectionError, EOFError):
                seen.reset = True
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
    except TimeoutError:
        seen.hung = True
    return seen


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: Exchange, seen: Seen) -> None:
    pieces = list(wanted.pieces)
    if wanted.waits_for_before:
        writer.write(pieces.pop(0))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        seen.received += head + await reader.readexactly(int(length[1]))

    async def send() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    async def receive() -> None:
        while more := await reader.read(65536):
            seen.received += more

    receiving = asyncio.create_task(receive())
    try:
        with contextlib.suppress(ConnectionError):
            await send()
        if wanted.garbled or wanted.meaning is UNFINISHED:
            await _until_silent(receiving, seen)
            if writer.can_write_eof() and not receiving.done():
                with contextlib.suppress(OSError):
                    writer.write_eof()
        await receiving
    finally:
        receiving.cancel()


async def _until_silent(receiving: "asyncio.Task[None]", seen: Seen) -> None:
    count = -1
    while count != len(seen.received):
        count = len(seen.received)
        done, _ = await asyncio.wait({receiving}, timeout=SILENT_S)
        if done:
            return


def answers_in(received: bytes, *, bodiless: str | None = None) -> tuple[list[Answer], bytes]:
    """The whole answers, and what is left behind them. Answers to `bodiless` have no body. 1xx are no answers."""
    answers: list[Answer] = []
    while True:
        head, end, rest = received.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        status = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]*", line)
        if not end or status is None:
            return answers, received
        if status[1].startswith(b"1"):
            received = rest
            continue
        fields = {name.lower(): value for name, _, value in (each.partition(b": ") for each in lines)}
        request_id = fields.get(b"x-request-id", b"").decode("latin-1") or None
        length = 0 if bodiless is not None and request_id == bodiless else int(fields[b"content-length"])
        if len(rest) < length:
            return answers, received
        closes = fields.get(b"connection", b"").lower() == b"close"
        answers.append(Answer(int(status[1]), request_id, closes, rest[:length]))
        received = rest[length:]


def wrong_with(wanted: Exchange, seen: Seen, rewards: Mapping[str, float]) -> str | None:
    """What is wrong with the answers, if anything."""
    answers, rest = answers_in(bytes(seen.received), bodiless="hostile" if wanted.bodiless else None)
    said = [(answer.status, answer.request_id) for answer in answers]
    if seen.hung:
        return f"no end after {HANG_S:g} s and {said}"
    if rest and not seen.reset:
        return f"{rest[:100]!r} after {said}"
    for answer in answers:
        if answer.status not in ANY:
            return f"status {answer.status}"
    ids = [answer.request_id for answer in answers if answer.request_id is not None]
    if len(set(ids)) < len(ids) or len(answers) - len(ids) > 1:
        return f"answered more than once: {said}"
    if "hidden" in ids and not wanted.garbled:
        return f"the hidden request was answered: {said}"
    for answer in answers:
        if answer.request_id is None and (answer is not answers[-1] or not answer.closes or answer.status == 200):
            return f"refused, and yet not over: {said}"
        if answer.status == 200 and (why := _wrong_rewards(answer, wanted, rewards)):
            return f"{answer.request_id} got {why}"
    return None if wanted.garbled else _wrong_order(wanted, answers, said, reset=seen.reset)


def _wrong_rewards(answer: Answer, wanted: Exchange, rewards: Mapping[str, float]) -> str | None:
    got = json.loads(answer.body)
    text = wanted.texts.get(answer.request_id or "")
    if text is None or (wanted.garbled and answer.request_id != "before"):
        return None if len(got.get("rewards", "no")) == 1 else f"{got}"
    right = got.get("request_id") == answer.request_id and abs(got["rewards"][0] - rewards[text]) <= TOLERANCE
    return None if right else f"{got['rewards']} as {got.get('request_id')!r}, not {rewards[text]}"


def _wrong_order(
    wanted: Exchange, answers: list[Answer], said: list[tuple[int, str | None]], *, reset: bool
) -> str | None:
    """Whether the sequence of answers is none of those that the request's meaning allows."""
    before: list[tuple[int, str | None]] = [(200, "before")] if "before" in wanted.texts else []
    refused: list[list[tuple[int, str | None]]] = [[(status, None)] for status in REFUSALS]
    served: list[list[tuple[int, str | None]]] = []
    early: list[list[tuple[int, str | None]]] = []
    """Answers that do not wait for the body, whose framing turns out to be wrong later."""
    for status in wanted.statuses:
        alone: list[tuple[int, str | None]] = [(status, "hostile")]
        if status != 200:
            early.append(alone)
        if wanted.leftover and wanted.closes is not True:
            served += [[*alone, *refusal] for refusal in refused]
            continue
        if wanted.closes is not False or wanted.meaning is UNFINISHED:
            served.append(alone)
        if wanted.closes is not True and wanted.meaning is not UNFINISHED:
            served.append([*alone, (200, "behind")])
    allowed = {
        SERVED: served,
        EITHER: served + refused + early,
        UNFINISHED: [[], *served, *refused],
        REFUSED: refused + (early if "chunks" in wanted.kind else []),
    }[wanted.meaning]
    if said in [before + after for after in allowed]:
        return None
    if wanted.meaning is UNFINISHED and not said:
        return None  # the client closed its side before the answer to `before` was there
    if reset and wanted.closes is not False and said == before[: len(said)]:
        return None  # more was sent than was asked for, and the system takes the answer back with it
    return f"{said}{' and a reset' if reset else ''} where {wanted.meaning.name} was due"


async def besiege(
    port: int, count: int, seed: int, rewards: Mapping[str, float], record: Callable[[int, str | None], None]
) -> None:
    """`count` connections, `AT_ONCE` at a time, to a service with the key `FUZZ_KEY`.

    `rewards` are those of the texts that are sent. `record` is told of each connection the status that `hostile` got, 0
    for none, and what was wrong, if anything.
    """
    draw = random.Random(seed)
    texts = list(rewards)
    left = count

    async def attack() -> None:
        nonlocal left
        while left:
            left -= 1
            wanted = exchange(draw, texts)
            seen = await carried_out(port, wanted)
            why = wrong_with(wanted, seen, rewards)
            if why is not None:
                why = f"{why}: {'garbled ' if wanted.garbled else ''}{wanted.kind or 'ordinary'}"
            record(_status_of_hostile(wanted, seen), why)

    await asyncio.gather(*[attack() for _ in range(AT_ONCE)])


def _status_of_hostile(wanted: Exchange, seen: Seen) -> int:
    answers, _ = answers_in(bytes(seen.received), bodiless="hostile" if wanted.bodiless else None)
    return next((answer.status for answer in answers if answer.request_id in ("hostile", None)), 0)
