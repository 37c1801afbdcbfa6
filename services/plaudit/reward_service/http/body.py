"""Receiving and parsing a request's body without blocking the event loop.

A JSON or msgpack parser holds the interpreter lock until it is done, so a thread doesn't help, and a hostile body of
four megabytes can take it minutes. Size, depth and number of values are therefore bounded before anything is built. A
small body is parsed in one call, a large one in pieces, between which the event loop serves other requests.

Failure modes: one request delays all others; parsed values take far more memory than the body's bound allows.
"""

import asyncio
import json
import re
import time
from typing import Any

import msgpack
from fastapi import Request

from plaudit import wire
from plaudit.reward_service.http.memory_budget import Reservation
from plaudit.reward_service.http.service import RESERVATION, ClientGoneError, Service
from plaudit.reward_service.problems import ProblemError

BODY_TIMEOUT_S = 60.0
"""Time limit for a body to arrive: until then it holds memory and a connection."""
SMALL_BYTES = 32 * 1024
"""A body of up to this size, with at most `SMALL_PARTS` commas and brackets, is parsed in one call: one or two
milliseconds."""
SMALL_PARTS = 1500
MAX_PARTS = wire.MAX_VALUES_PER_REQUEST
"""Bound on the values and keys of a body. Every valid request of the supported protocols has fewer."""
MAX_DEPTH = 32
MAX_NUMBER_CHARS = 64
"""Bound on a number in JSON. Floats have at most 24 characters; parsing an integer takes quadratic time."""
TIME_SLICE_S = 0.003
"""How long parsing a large body may occupy the event loop without a pause."""
PIECE_BYTES = 64 * 1024

SPACE = re.compile(rb"[ \t\n\r]*")
UNITS = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)
"""Whole characters and escapes of a string."""
SCALAR = re.compile(rb"-?[0-9][0-9.eE+-]*|true|false|null|NaN|-?Infinity")
HIGH_SURROGATES = range(0xD800, 0xDC00)
QUOTE = ord('"')


class TimeSlice:
    """Cooperative yielding: says when `TIME_SLICE_S` is over, and then gives up the event loop for one turn."""

    def __init__(self) -> None:
        self._until = time.monotonic() + TIME_SLICE_S

    @property
    def over(self) -> bool:
        """Whether the time slice is used up."""
        return time.monotonic() > self._until

    async def next(self) -> None:
        """Let other tasks run, and begin a new time slice."""
        await asyncio.sleep(0)
        self._until = time.monotonic() + TIME_SLICE_S


async def read_body(service: Service, request: Request) -> bytes:
    """The whole body; its bytes are reserved in the memory budget until the request is answered.

    Raises `ProblemError` as soon as the body is known to be too large, or has taken too long.
    """
    limit = service.limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise ProblemError("body-too-large", f"the body has {declared} bytes; at most {limit} are taken")
    reservation = request.scope[RESERVATION] = Reservation(service.memory)
    with service.refused_by_drain():
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body, complete = await _next_chunk(request, limit, limit)
                reservation.grow(len(body))
                if complete:
                    return body
                chunks = [body]
                size = len(body)
                while not complete:
                    body, complete = await _next_chunk(request, limit, limit - size)
                    reservation.grow(len(body))
                    chunks.append(body)
                    size += len(body)
        except TimeoutError:
            raise ProblemError("request-timeout", f"the body didn't arrive within {BODY_TIMEOUT_S:g} s") from None
    return b"".join(chunks)


async def _next_chunk(request: Request, limit: int, room: int) -> tuple[bytes, bool]:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    chunk: bytes = message.get("body", b"")
    if len(chunk) > room:
        raise ProblemError("body-too-large", f"the body has more than the {limit} bytes that are taken")
    return chunk, not message.get("more_body", False)


async def read_document(service: Service, request: Request, *, msgpack: bool) -> tuple[bytes | None, Any]:
    """The body of a request, as (raw, None) or (None, value).

    Small JSON stays raw: pydantic parses and validates it in one pass. Anything else is parsed here, in pieces. Raises
    `ProblemError`.
    """
    body = await read_body(service, request)
    if msgpack:
        return None, await parse_msgpack(body)
    return (body, None) if is_small(body) else (None, await parse_json(body))


def is_small(body: bytes) -> bool:
    """Whether the body can be parsed in one call without delaying other requests."""
    return len(body) <= SMALL_BYTES and body.count(b",") + body.count(b"[") + body.count(b"{") <= SMALL_PARTS


async def parse_json(body: bytes) -> Any:
    """The JSON value in `body`. Raises `ProblemError` when it is malformed, nested too deep or has too many values."""
    if is_small(body):
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _malformed("JSON", str(error)) from None
    if body[:4].count(0) or body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _malformed("JSON", "it is in UTF-16 or UTF-32; send UTF-8")
    return await _LargeJson(body).value()


async def parse_msgpack(body: bytes) -> Any:
    """The msgpack value in `body`. Raises `ProblemError`."""
    await _count_msgpack(body)
    try:
        return msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise _malformed("msgpack", str(error)) from None


class _LargeJson:
    """A JSON parser that pauses. Strings, which are most of a body, are decoded by the C parser."""

    def __init__(self, body: bytes) -> None:
        self._body = body.removeprefix(b"\xef\xbb\xbf")
        self._at = 0
        self._parts = 0
        self._slice = TimeSlice()

    async def value(self) -> Any:
        """The whole body as one value."""
        stack: list[tuple[Any, str | None]] = []
        """The open containers, each with its key in the container around it."""
        key: str | None = None
        while True:
            if self._slice.over:
                await self._slice.next()
            found, opened = await self._begin()
            if opened:
                if len(stack) == MAX_DEPTH:
                    raise ProblemError(
                        "malformed-body", f"the body is nested more than {MAX_DEPTH} deep; no request needs that"
                    )
                stack.append((found, key))
                key = None
                if not self._next_is(b"}" if isinstance(found, dict) else b"]"):
                    if isinstance(found, dict):
                        key = await self._key()
                    continue
                found, key = stack.pop()
            while True:
                if not stack:
                    self._skip()
                    if self._at != len(self._body):
                        raise self._wrong("the end was expected")
                    return found
                around, of_around = stack[-1]
                if isinstance(around, dict):
                    assert key is not None
                    around[key] = found
                else:
                    around.append(found)
                if self._next_is(b","):
                    key = await self._key() if isinstance(around, dict) else None
                    break
                if not self._next_is(b"}" if isinstance(around, dict) else b"]"):
                    raise self._wrong("a comma or the end of a list or an object was expected")
                found, key = around, of_around
                stack.pop()

    async def _begin(self) -> tuple[Any, bool]:
        """A whole scalar, or a container that was opened and is still empty; and which of the two."""
        self._skip()
        self._count()
        first = self._body[self._at : self._at + 1]
        if first == b'"':
            return await self._string(), False
        if first in (b"{", b"["):
            self._at += 1
            return ({} if first == b"{" else []), True
        scalar = SCALAR.match(self._body, self._at, self._at + MAX_NUMBER_CHARS + 1)
        if scalar is None:
            raise self._wrong("a value was expected")
        if len(scalar[0]) > MAX_NUMBER_CHARS:
            raise ProblemError(
                "malformed-body",
                f"at byte {self._at} the body holds a number of more than {MAX_NUMBER_CHARS} characters; no request "
                "needs that",
            )
        try:
            value = json.loads(scalar[0])
        except ValueError:
            raise self._wrong("a value was expected") from None
        self._at = scalar.end()
        return value, False

    async def _key(self) -> str:
        self._skip()
        if self._body[self._at : self._at + 1] != b'"':
            raise self._wrong("a key was expected")
        self._count()
        key = await self._string()
        if not self._next_is(b":"):
            raise self._wrong("a colon was expected")
        return key

    async def _string(self) -> str:
        began = self._at
        self._at += 1
        pieces: list[str] = []
        while True:
            stop, ended = self._piece()
            try:
                piece: str = json.loads(b'"' + self._body[self._at : stop] + b'"')
            except ValueError as error:
                raise _malformed("JSON", f"the string that begins at byte {began}: {error}") from None
            if not ended and piece and ord(piece[-1]) in HIGH_SURROGATES:
                stop -= len(rb"\ud800")  # both halves of a surrogate pair must be decoded together
                piece = piece[:-1]
            pieces.append(piece)
            if ended:
                self._at = stop + 1
                return piece if len(pieces) == 1 else "".join(pieces)
            if stop == self._at:
                raise _malformed("JSON", f"the string that begins at byte {began} has no end")
            self._at = stop
            if self._slice.over:
                await self._slice.next()

    def _piece(self) -> tuple[int, bool]:
        """Where the next piece ends, without cutting a character or an escape, and whether the string ends there."""
        start, limit = self._at, min(self._at + PIECE_BYTES, len(self._body))
        quote = self._body.find(b'"', start, limit)
        stop = limit if quote < 0 else quote
        if self._body.find(b"\\", start, stop) >= 0:
            found = UNITS.match(self._body, start, limit)
            assert found is not None
            stop = found.end()
        if stop < len(self._body) and self._body[stop] == QUOTE:
            return stop, True
        while stop > start and stop < len(self._body) and self._body[stop] & 0xC0 == 0x80:
            stop -= 1
        return stop, False

    def _skip(self) -> None:
        found = SPACE.match(self._body, self._at, self._at + PIECE_BYTES)
        assert found is not None
        if len(found[0]) == PIECE_BYTES:
            raise _malformed("JSON", f"{PIECE_BYTES} spaces follow byte {self._at}")
        self._at = found.end()

    def _next_is(self, byte: bytes) -> bool:
        self._skip()
        if self._body[self._at : self._at + 1] != byte:
            return False
        self._at += 1
        return True

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _too_much()

    def _wrong(self, what: str) -> ProblemError:
        return _malformed("JSON", f"{what} at byte {self._at}")


SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}
"""Bytes of the length that follows the type byte of a string, a binary or an extension."""
FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Bytes of the count that follows the type byte, and values for each entry."""


async def _count_msgpack(body: bytes) -> None:
    """Walk over all values without building them. Raises `ProblemError` when there are too many, or nested too deep."""
    at = parts = 0
    open_values = [1]
    time_slice = TimeSlice()
    while open_values and at < len(body):
        if not open_values[-1]:
            open_values.pop()
            continue
        open_values[-1] -= 1
        parts += 1
        if parts > MAX_PARTS:
            raise _too_much()
        kind = body[at]
        at += 1
        inside = 0
        if kind in SIZES:
            width = SIZES[kind]
            at += width + int.from_bytes(body[at : at + width], "big") + (kind in (0xC7, 0xC8, 0xC9))
        elif kind in CONTAINERS:
            width, each = CONTAINERS[kind]
            inside = each * int.from_bytes(body[at : at + width], "big")
            at += width
        elif 0x80 <= kind <= 0x8F:
            inside = 2 * (kind & 15)
        elif 0x90 <= kind <= 0x9F:
            inside = kind & 15
        elif 0xA0 <= kind <= 0xBF:
            at += kind & 31
        else:
            at += FIXED.get(kind, 0)
        if inside:
            if inside > len(body) - at:
                return  # the body is incomplete, which the parser reports
            open_values.append(inside)
            if len(open_values) > MAX_DEPTH + 1:
                raise ProblemError(
                    "malformed-body", f"the body is nested more than {MAX_DEPTH} deep; no request needs that"
                )
        if time_slice.over:
            await time_slice.next()


def _malformed(what: str, why: str) -> ProblemError:
    return ProblemError("malformed-body", f"the body is not {what}: {why}")


def _too_much() -> ProblemError:
    return ProblemError(
        "too-many-items", f"the body holds more than {MAX_PARTS} values and keys; send fewer items in a request"
    )
