"""A bound on what a request may hold before its body: request line and headers, and trailers after it.

The parser keeps all of it until it is complete. Wrong here would be a client that fills the memory by never ending it.
"""

from collections.abc import Callable
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from plaudit import wire
from plaudit.reward_service.problems import ProblemError

MAX_HEAD_BYTES = 64 * 1024
LINGER_S = 1.0
"""How long a refused client may go on sending: closed at once, its own unread bytes would cost it the answer."""
SEPARATORS = len(b": \r\n")


def head_too_large() -> ProblemError:
    return ProblemError("headers-too-large", f"request line and headers have more than {MAX_HEAD_BYTES} bytes")


def head_bytes(scope: Scope) -> int:
    """The size of a complete head, about as it came over the wire."""
    headers = scope["headers"]
    return (
        sum([len(name) + len(value) for name, value in headers])
        + SEPARATORS * len(headers)
        + len(scope["path"])
        + len(scope["query_string"])
    )


class BoundedHead(HttpToolsProtocol):
    """A connection that ends with 431 when a head isn't complete after `MAX_HEAD_BYTES`. `refused` is told."""

    def __init__(self, *arguments: Any, refused: Callable[[ProblemError], None], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._refused = refused
        self._unparsed = 0
        """Bytes since a head, a piece of a body or a request was last complete."""
        self._over = False

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()

    def _refuse(self) -> None:
        self._over = True
        problem = head_too_large()
        self._refused(problem)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # it would be read as the answer to the request before
            return
        body = problem.document().model_dump_json(exclude_none=True).encode()
        fields = (
            f"content-type: {wire.PROBLEM_CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[problem.status] + fields.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
