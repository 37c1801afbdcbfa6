"""What a server sends is not to be trusted: its size, its bytes that nobody asked for, and what it does to a terminal.

What would be wrong here: an answer to one request taken for the answer to another, a small answer that fills the memory
when it is unpacked, or a server that writes to the clipboard of whoever reads the log.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import httpx

GZIP = 16 + zlib.MAX_WBITS
SECRET = "[secret]"


class Unreadable(Exception):
    """The answer is packed in a way that isn't read here."""


async def read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of the body, unpacked, and whether that is all of it. Raises `Unreadable`.

    Bytes are unpacked as they come and never beyond the limit: 800 bytes of gzip in gzip hold a gigabyte.
    """
    if response.is_stream_consumed:  # a test's transport has it whole
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
    """Call with the body read. Closes the connection, and gives True, if bytes behind the answer have come with it.

    Nobody asked for them, and the next request on the connection would take them for its answer. (Bytes that come
    later are seen by the connection pool before it uses the connection again.) Where the HTTP library keeps them out of
    sight, the connection is closed to be sure.
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
    """The text with each of the secrets taken out, for servers that repeat what they were sent."""
    for secret in secrets:
        text = text.replace(secret, SECRET)
    return text
