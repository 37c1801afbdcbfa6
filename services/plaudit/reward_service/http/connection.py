"""One HTTP/1.1 connection, with bounds on the size and time of each request and strict framing.

httptools keeps a head until it is complete, and accepts requests that another server in front may read differently.

Failure modes: a client that never ends a request fills the memory or the table of open files; a body runs as a request
of its own (request smuggling).
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from plaudit import wire
from plaudit.reward_service.http.request_head import OVER_CONNECTION_LIMIT, head_too_large, too_many_connections
from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import MAX_HEAD_BYTES

HEAD_TIMEOUT_S = 15.0
"""How long a connection may stay silent before its first request, or a head incomplete."""
REST_TIMEOUT_S = 65.0
"""How long the rest of a body may take. While a handler waits for it, that has a shorter time of its own."""
OVER_LIMIT_HEAD_TIMEOUT_S = 2.0
CHECK_TIMEOUT_S = 5.0
LINGER_S = 1.0
"""How long a refused client may go on sending: closed at once, its own unread bytes would cost it the answer."""
HOST = re.compile(rb"[\x21\x23-\x2b\x2d\x2e\x30-\x3b\x3d\x41-\x5b\x5d\x5f-\x7e]*")
"""Characters of a host and port (RFC 9110, 7.2)."""


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
        self._over_limit = False
        self._in_head = False
        self._in_body = False
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._over_limit = len(self.connections) > self._bound
        self._wait(OVER_LIMIT_HEAD_TIMEOUT_S if self._over_limit else HEAD_TIMEOUT_S, for_body=False)

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
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._in_head, self._in_body = False, True
        problem = None if self._over else self._misframed()
        if problem is not None:
            self._refuse(problem)
        if self._over:
            return
        if self._over_limit:
            self.scope[OVER_CONNECTION_LIMIT] = lambda: too_many_connections(self._bound)  # type: ignore[literal-required]
        super().on_headers_complete()
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

    def _refuse(self, problem: ProblemError) -> None:
        self._over = True
        self._wait_no_more()
        self._refused(problem)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # it would be read as the answer to the request before
            return
        body = problem.body()
        fields = (
            f"content-type: {wire.PROBLEM_CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[problem.status] + fields.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


async def check_connection() -> None:
    """Whether uvicorn's class still does what `Connection` expects of it. Raises otherwise.

    One request in two pieces must reach the application and be answered; one with two Host headers must be refused.
    """
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message["more_body"]:
            more = await receive()
            message = {**more, "body": message["body"] + more["body"]}
        seen.append((scope["method"], scope["path"], dict(scope["headers"])[b"host"], message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(application, lifespan="off", ws="none", access_log=False, log_config=None)
    refusals: list[ProblemError] = []
    answers = []
    for pieces in (
        (b"POST /path HTTP/1.1\r\nHost: a\r\nContent-Le", b"ngth: 4\r\n\r\nbody"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",),
    ):
        state, transport = ServerState(), _RecordingTransport()
        connection = Connection(config=config, server_state=state, app_state={}, refused=refusals.append)
        connection.connection_made(transport)
        if connection._deadline is None or state.connections != {connection}:
            raise RuntimeError("a new connection is not registered or has no deadline")
        for piece in pieces:
            connection.data_received(piece)
        await asyncio.wait_for(asyncio.gather(*state.tasks), CHECK_TIMEOUT_S)
        connection.connection_lost(None)
        answers.append(transport.written.split(b"\r\n\r\n", 1))
    if seen != [("POST", "/path", b"a", b"body")] or not answers[0][0].startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"a request of two pieces became {seen}, answered {answers[0]}")
    if [problem.name for problem in refusals] != ["malformed-request"] or not answers[1][0].startswith(b"HTTP/1.1 400"):
        raise RuntimeError(f"a request with two Host headers was answered {answers[1]}")


class _RecordingTransport(asyncio.Transport):
    """A transport to nowhere, for `check_connection`."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        self._closing = True

    def is_closing(self) -> bool:
        return self._closing
