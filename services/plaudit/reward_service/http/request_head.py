"""One connection: what its requests may hold before their bodies, how long they may take, and how they must be framed.

The parser keeps a head until it is complete, and is lenient where another server in front may read the same bytes as
other requests. Wrong here would be a client that fills the memory, or the table of open files, by never
ending a request, or a body that runs as a request of its own.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from plaudit import wire
from plaudit.reward_service.problems import ProblemError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 15.0
"""How long a connection may stay silent before its first request, or a head incomplete."""
REST_TIMEOUT_S = 65.0
"""How long the rest of a body may take. While a handler waits for it, that has a shorter time of its own."""
CROWDED_HEAD_TIMEOUT_S = 2.0
LINGER_S = 1.0
"""How long a refused client may go on sending: closed at once, its own unread bytes would cost it the answer."""
SEPARATORS = len(b": \r\n")
CROWDED = "plaudit.crowded"
"""In the scope of a request on a connection beyond the bound: a function that makes its refusal. Health answers."""
REFUSED = "plaudit.refused"
"""In the scope of a request whose body turned out to be no body: it has been refused, and counted, already."""
HOST = re.compile(rb"[\x21\x23-\x2b\x2d\x2e\x30-\x3b\x3d\x41-\x5b\x5d\x5f-\x7e]*")
"""Characters of a host and port (RFC 9110, 7.2)."""
VERSIONS = ("1.1", "1.0")
"""Of HTTP. The parser takes 0.9 and 2.0 for it as well, which frame nothing like this."""


def head_too_large() -> ProblemError:
    return ProblemError("headers-too-large", f"request line and headers have more than {MAX_HEAD_BYTES} bytes")


def too_many_connections(bound: int) -> ProblemError:
    return ProblemError(
        "too-many-connections",
        f"{bound} connections are open, and that is the bound; health alone answers on this one. Keep connections and "
        "use them again, or come back later",
        retry_after_s=1,
    )


def head_bytes(scope: Scope) -> int:
    """The size of a complete head, about as it came over the wire."""
    headers = scope["headers"]
    return (
        sum([len(name) + len(value) for name, value in headers])
        + SEPARATORS * len(headers)
        + len(scope["path"])
        + len(scope["query_string"])
    )


class Connection(HttpToolsProtocol):
    """A connection that ends when a request on it is too large, too slow or ambiguous. `refused` is told why.

    `bound` is how many may be open; those beyond are only told so, but for health.
    """

    def __init__(
        self, *arguments: Any, refused: Callable[[ProblemError], None], bound: int = 2**31, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._refused = refused
        self._bound = bound
        self._unparsed = 0
        """Bytes since a head, a piece of a body or a request was last complete."""
        self._over = False
        self._crowded = False
        self._in_head = False
        self._in_body = False
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for_body = False
        self._due: ProblemError | None = None
        """The refusal that goes out when the requests before it are answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._crowded = len(self.connections) > self._bound
        self._wait(CROWDED_HEAD_TIMEOUT_S if self._crowded else HEAD_TIMEOUT_S, for_body=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._over or self.transport.is_closing():
            return
        if self._unparsed > MAX_HEAD_BYTES:
            self._refuse(head_too_large())
        elif self._in_head or self._in_body:
            if self._deadline is None or self._waits_for_body != self._in_body:
                self._wait(REST_TIMEOUT_S if self._in_body else HEAD_TIMEOUT_S, for_body=self._in_body)
        elif self._deadline is not None and self.cycle is not None:
            self._wait_no_more()
        elif self._deadline is None and self._is_idle and self.timeout_keep_alive_task is None:
            self._wait(HEAD_TIMEOUT_S, for_body=False)  # empty lines, that begin nothing

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self, seconds: float, *, for_body: bool) -> None:
        self._wait_no_more()
        self._waits_for_body = for_body
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if not self._is_idle:
            # A request is being answered: its handler looks to its own time, and nothing more is read meanwhile.
            self._wait(HEAD_TIMEOUT_S, for_body=self._waits_for_body)
        elif self._in_head:
            self._refuse(ProblemError("request-timeout", f"the request's head took more than {HEAD_TIMEOUT_S:g} s"))
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, and those count for nothing
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._in_head = False
        problem = None if self._over else self._misframed()
        if problem is not None:
            self._refuse(problem)
        if self._over:
            return
        if self._crowded:
            self.scope[CROWDED] = lambda: too_many_connections(self._bound)  # type: ignore[literal-required]
        super().on_headers_complete()
        self._in_body = True
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # what follows isn't read as a request

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_body = False
        if not self._over:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._over:
            self._refuse(ProblemError("malformed-request", "this is not HTTP/1.1, or not framed as RFC 9112 says"))

    def _unsupported_upgrade_warning(self) -> None:
        pass  # the upgrade is not taken, as RFC 9110 allows; not worth a line in the log for each

    def _misframed(self) -> ProblemError | None:
        """Why this head can't be trusted to mean the same to everybody who reads it (RFC 9110 and 9112)."""
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            return ProblemError("malformed-request", f"HTTP/{version} came; this is a server of HTTP/1.1 and 1.0")
        hosts: list[bytes] = []
        coding: list[bytes] = []
        lengths: list[bytes] = []
        upgrade = False
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                coding.append(value)
            elif name == b"content-length":
                lengths.append(value)
            elif name == b"upgrade":
                upgrade = True
        if len(hosts) > 1 or (not hosts and version != "1.0"):
            return ProblemError("malformed-request", f"{len(hosts)} Host headers came; a request has one")
        if hosts and HOST.fullmatch(hosts[0]) is None:
            return ProblemError("malformed-request", "the Host header holds no host")
        if coding:
            if version == "1.0" or lengths:
                return ProblemError(
                    "malformed-request", "Transfer-Encoding goes with HTTP/1.1 alone, and not with Content-Length"
                )
            if [part.strip().lower() for part in b",".join(coding).split(b",")] != [b"chunked"]:
                return ProblemError("unknown-transfer-coding", "of transfer codings, chunked alone is understood")
        if len(lengths) > 1:
            return ProblemError("malformed-request", f"{len(lengths)} Content-Length headers came; a request has one")
        if upgrade and (coding or lengths not in ([], [b"0"])):
            return ProblemError("malformed-request", "a request with a body can't be upgraded; leave Upgrade out")
        return None

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._due is not None and not self.transport.is_closing():
            self._tell(self._due)

    def _refuse(self, problem: ProblemError) -> None:
        """Read no more, answer what came before, then `problem`, and close: one answer for each request."""
        self._over = True
        self._wait_no_more()
        self._refused(problem)
        cycle = self.cycle
        if self._in_body and cycle.response_complete:
            self._close_gently()  # it has had its answer, before its body was all there
        elif self._in_body and not self.pipeline:
            if cycle.response_started:
                self.transport.close()
                return
            cycle.disconnected = True  # what its handler says now goes nowhere
            cycle.scope[REFUSED] = True  # type: ignore[literal-required]
            cycle.waiting_for_100_continue = False
            cycle.message_event.set()
            self._tell(problem)
        elif self._in_body:
            self.pipeline.popleft()  # it waits for an answer to another
            self._due = problem
        elif cycle is not None and not cycle.response_complete:
            self._due = problem
        else:
            self._tell(problem)

    def _tell(self, problem: ProblemError) -> None:
        body = problem.document().model_dump_json(exclude_none=True).encode()
        fields = (
            f"content-type: {wire.PROBLEM_CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[problem.status] + fields.encode() + body)
        self._close_gently()

    def _close_gently(self) -> None:
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
