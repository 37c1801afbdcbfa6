"""One HTTP/1.1 connection, with bounds on the size and time of each request and strict framing.

httptools keeps a head until it is complete, and accepts requests that another server in front may read differently.

Failure modes: a client that never ends a request fills the memory or the table of open files; a body runs as a request
of its own (request smuggling); a killed service leaves half an answer.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from plaudit import wire
from plaudit.reward_service.http.request_head import (
    OVER_CONNECTION_LIMIT,
    REFUSED,
    head_too_large,
    too_many_connections,
)
from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import MAX_HEAD_BYTES

HEAD_TIMEOUT_S = 15.0
"""Time limit for the first byte of a connection, and for a head to be complete."""
REST_TIMEOUT_S = 65.0
"""Time limit for the rest of a body that no handler waits for. A handler's own limit is shorter."""
OVER_LIMIT_HEAD_TIMEOUT_S = 2.0
"""`HEAD_TIMEOUT_S` of connections beyond the bound."""
CHECK_TIMEOUT_S = 5.0
LINGER_S = 1.0
"""How long a refused connection stays open: closing it with unread bytes would reset it and lose the refusal."""
HOST = re.compile(rb"[\x21\x23-\x2b\x2d\x2e\x30-\x3b\x3d\x41-\x5b\x5d\x5f-\x7e]*")
"""Characters of a host and port (RFC 9110, section 7.2)."""
VERSIONS = ("1.1", "1.0")
"""Supported versions of HTTP. The parser also accepts 0.9 and 2.0, whose messages are framed differently."""


class Connection(HttpToolsProtocol):
    """A connection that is closed when a request on it is too large, too slow or ambiguous.

    `refused` is called with each refusal, for the metrics. `bound` is the number of connections that may be open;
    connections beyond it answer health routes only.
    """

    def __init__(
        self, *arguments: Any, refused: Callable[[ProblemError], None], bound: int = 2**31, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._refused = refused
        self._bound = bound
        self._unparsed = 0
        """Bytes received since a head, a piece of a body or a request was last complete."""
        self._over = False
        self._over_limit = False
        self._in_head = False
        self._in_body = False
        self._deadline: asyncio.TimerHandle | None = None
        self._waits_for_body = False
        self._due: ProblemError | None = None
        """The refusal that goes out when the requests before it are answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._over_limit = len(self.connections) > self._bound
        self._wait(OVER_LIMIT_HEAD_TIMEOUT_S if self._over_limit else HEAD_TIMEOUT_S, for_body=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then enforce the bounds on size and time."""
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
            self._wait(HEAD_TIMEOUT_S, for_body=False)  # empty lines, which begin no request

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
            # A request is being answered: its handler has its own time limit, and nothing more is read meanwhile.
            self._wait(HEAD_TIMEOUT_S, for_body=self._waits_for_body)
        elif self._in_head:
            self._refuse(ProblemError("request-timeout", f"the request's head took more than {HEAD_TIMEOUT_S:g} s"))
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; fields of a trailer are ignored."""
        if self._in_head:
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        """Refuse ambiguous framing, else start the handler."""
        self._unparsed = 0
        self._in_head = False
        problem = None if self._over else self._misframed()
        if problem is not None:
            self._refuse(problem)
        if self._over:
            return
        if self._over_limit:
            self.scope[OVER_CONNECTION_LIMIT] = lambda: too_many_connections(self._bound)  # type: ignore[literal-required]
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # such an answer has no body to wait for
            self.cycle.transport = _WholeAnswers(self.transport)  # type: ignore[assignment]
        self._in_body = True
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # what follows isn't read as a request

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        self._unparsed = 0
        if not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._unparsed = 0
        self._in_body = False
        if not self._over:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what httptools can't parse, as a problem document."""
        if not self._over:
            self._refuse(ProblemError("malformed-request", "this is not HTTP/1.1, or not framed as RFC 9112 requires"))

    def _unsupported_upgrade_warning(self) -> None:
        pass  # ignoring an upgrade is allowed (RFC 9110), and not worth a log line each time

    def _misframed(self) -> ProblemError | None:
        """Why another server may read this head differently (RFC 9110 and 9112); None if it is unambiguous."""
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
            return ProblemError("malformed-request", f"the request has {len(hosts)} Host headers; send one")
        if hosts and HOST.fullmatch(hosts[0]) is None:
            return ProblemError("malformed-request", "the Host header is not a valid host")
        if coding:
            if version == "1.0" or lengths:
                return ProblemError("malformed-request", "Transfer-Encoding needs HTTP/1.1 and no Content-Length")
            if [part.strip().lower() for part in b",".join(coding).split(b",")] != [b"chunked"]:
                return ProblemError("unknown-transfer-coding", "the only supported transfer coding is chunked")
        if len(lengths) > 1:
            return ProblemError("malformed-request", f"the request has {len(lengths)} Content-Length headers; send one")
        if upgrade and (coding or lengths not in ([], [b"0"])):
            return ProblemError("malformed-request", "a request with a body can't be upgraded; omit Upgrade")
        return None

    def on_response_complete(self) -> None:
        """Send a pending refusal once the answers to all earlier requests are out."""
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._due is not None and not self.transport.is_closing():
            self._tell(self._due)

    def _refuse(self, problem: ProblemError) -> None:
        """Stop reading, answer earlier requests, then send `problem` and close: one answer for each request."""
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
        body = problem.body()
        fields = (
            f"content-type: {wire.PROBLEM_CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[problem.status] + fields.encode() + body)
        self._close_gently()

    def _close_gently(self) -> None:
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


class _WholeAnswers:
    """What an answer is written to: its head waits for the first piece of its body, and both leave in one write.

    uvicorn writes a head by itself. A service that is killed before the body follows would leave half an answer. A
    balancer has begun to pass that on by then, and can no longer ask another replica.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Keep a head; send everything else, the first piece of a body after the head that was kept."""
        if self._head is not None:
            self._transport.write(self._head + data)
            self._head = b""
        elif data.startswith(STATUS_LINE[100]):
            self._transport.write(data)
        else:
            self._head = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def check_connection() -> None:
    """Whether uvicorn's class still does what `Connection` expects of it. Raises otherwise.

    One request in two pieces must reach the application and be answered in one write; one with two Host headers must be
    refused.
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
        if len(transport.written) != 1:
            raise RuntimeError(f"one answer was written as {transport.written}")
        answers.append(transport.written[0].split(b"\r\n\r\n", 1))
    if seen != [("POST", "/path", b"a", b"body")] or not answers[0][0].startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"a request of two pieces became {seen}, answered {answers[0]}")
    if [problem.name for problem in refusals] != ["malformed-request"] or not answers[1][0].startswith(b"HTTP/1.1 400"):
        raise RuntimeError(f"a request with two Host headers was answered {answers[1]}")


class _RecordingTransport(asyncio.Transport):
    """A transport to nowhere, for `check_connection`."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        self._closing = True

    def is_closing(self) -> bool:
        return self._closing
