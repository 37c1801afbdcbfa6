"""Safe handling of untrusted answers: bounded decompression, extra bytes on a connection, secrets that servers echo.

Failure modes: an answer to one request is taken for the answer to another; a small answer fills the memory when it is
decompressed; a credential that a server echoes ends up in a log.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import httpx

GZIP = 16 + zlib.MAX_WBITS
SECRET = "[secret]"


class Unreadable(Exception):
    """The answer is compressed with an unsupported encoding."""


async def read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of the decompressed body, and whether that is all of it. Raises `Unreadable`.

    Bytes are decompressed as they arrive and never beyond the limit: 800 bytes of nested gzip can hold a gigabyte.
    """
    if response.is_stream_consumed:  # a test's transport holds the whole body
        return response.content[:limit], len(response.content) <= limit
    encodings = [name for name in response.headers.get("content-encoding", "").replace(" ", "").split(",") if name]
    packed = encodings in (["gzip"], ["x-gzip"])
    if encodings and not packed and encodings != ["identity"]:
        raise Unreadable(f"the answer is packed ({', '.join(encodings):.80}); identity was asked for")
    unpack = zlib.decompressobj(GZIP) if packed else None
    body = bytearray()
    async for part in response.aiter_raw():
        if unpack is not None:
            try:
                part = unpack.decompress(part, limit + 1 - len(body))
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from error
        body += part
        if len(body) > limit:
            return bytes(body[:limit]), False
    if unpack is not None and not unpack.eof:
        raise httpx.DecodingError("the gzip stream is cut off")
    return bytes(body), True


async def break_if_more_came(response: httpx.Response) -> bool:
    """Close the connection and return True if extra bytes followed the answer. Call it after reading the body.

    The next request on the connection would take them for its answer. (The connection pool detects bytes that arrive
    later, before it reuses the connection.) If the HTTP library doesn't expose extra bytes, the connection is closed in
    any case.
    """
    network = response.extensions.get("network_stream")
    if network is None:
        return False  # not a connection: a test's transport
    stream: Any = response.stream
    for name in ("_stream", "_httpcore_stream", "_stream", "_connection", "_h11_state"):
        stream = getattr(stream, name, None)
    left_over = getattr(stream, "trailing_data", None)
    if left_over is None or left_over[0]:
        await network.aclose()
    return left_over is not None and bool(left_over[0])


def without(text: str, secrets: Sequence[str]) -> str:
    """The text with each secret replaced by a placeholder, because servers may echo what they were sent."""
    for secret in secrets:
        text = text.replace(secret, SECRET)
    return text
