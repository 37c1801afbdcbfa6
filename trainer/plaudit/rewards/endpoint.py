"""One endpoint: sends one request, reads one answer and classifies failures. It never waits and never retries."""

import asyncio
import json
import logging
import secrets
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urlsplit

import httpx
from pydantic import ValidationError

from plaudit.rewards.answers import Unreadable, break_if_more_came, read, without
from plaudit.rewards.errors import KEPT_HEADERS, Exchange, NoScore, RewardRejected, shown
from plaudit.rewards.protocols import DIALECTS, recognise
from plaudit.rewards.protocols.base import BrokenBody, Dialect, NoVerdict, UnusableAnswer
from plaudit.rewards.proxies import Proxy
from plaudit.rewards.rendering import Rendering
from plaudit.rewards.rows import Row
from plaudit.rewards.settings import RewardComponent, without_credentials
from plaudit.wire import (
    FINAL_PROBLEMS,
    MODEL_PATH,
    REQUEST_ID_HEADER,
    WIRE_HEADER,
    WIRE_VERSION,
    ModelInfo,
    Problem,
    RewardItem,
    RewardResponse,
)

log = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({408, 425, 429})
"""4xx statuses that are retried. So is every 5xx except 501, 505 and permanent problem documents."""
OWN_WRITING = frozenset({"plaudit", "chat-judge"})
"""Protocols that render conversations on the server or in the question, so the client need not render them."""
DESCRIBE_TIMEOUT_S = 10.0
QUOTED_CHARS = 300
MAX_NAME_CHARS = 1000
SHORTEST_SECRET = 4
MAX_ANSWER_BYTES = 16 * 2**20
"""More than any answer to `wire.MAX_ITEMS_PER_REQUEST` texts needs. Longer answers are not read into memory."""


class Trouble(Exception):
    """A transient failure: the request can be retried, on this endpoint or another one."""

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, server_error: bool = False, exchange: Exchange
    ) -> None:
        super().__init__(shown(message))
        self.retry_after_s = retry_after_s
        self.server_error = server_error
        """The server failed on the request (500), so the request itself may be the cause."""
        self.exchange = exchange


class Endpoint:
    """A reward server at one URL, with its recent failures."""

    def __init__(
        self,
        url: str,
        component: RewardComponent,
        http: httpx.AsyncClient,
        request_timeout_s: float,
        max_in_flight: int,
        *,
        proxy: Proxy | None = None,
        rendering: Rendering | None = None,
    ) -> None:
        self.url = without_credentials(url).rstrip("/")
        """Without credentials, for messages and files."""
        if component.kind == "chat-judge":
            self.url = self.url.removesuffix("/v1")  # clients of that API are configured with it
        self.places = asyncio.Semaphore(max_in_flight)
        """Limits the number of concurrent requests."""
        self.info: ModelInfo | None = None
        self.outstanding = 0
        self.failures = 0
        """Failures since the last usable answer."""
        self.aside_until = 0.0
        """Loop time before which other endpoints are preferred."""
        self._component = component
        self._dialect: Dialect | None = None if component.kind == "auto" else DIALECTS[component.kind](component)
        self._http = http
        self._rendering = rendering
        self._auth = _basic_auth(url)
        self._secrets = _secrets(url, http.headers, component)
        self._request_timeout_s = request_timeout_s
        host = urlsplit(self.url).hostname
        self._via = f", through {proxy}; NO_PROXY={host} goes around it" if proxy is not None else ""
        self._warned_of_age = False

    async def describe(self) -> ModelInfo:
        """Request the model's description. Raises `Trouble` while it isn't ready, `RewardRejected` if it can't be
        used."""

        ids: dict[str, str] = {}

        async def get(path: str) -> bytes:
            exchange = Exchange("GET", self.url + path, "")
            ids[path] = secrets.token_hex(8)
            return await self._exchange(exchange, min(DESCRIBE_TIMEOUT_S, self._request_timeout_s), ids[path])

        try:
            if self._dialect is None:
                self._dialect = await recognise(self._component, get)
            info = await self._dialect.describe(get)
        except BrokenBody as error:
            raise Trouble(f"{self.url}: broken answer ({error})", exchange=Exchange("GET", self.url, "")) from error
        except UnusableAnswer as error:
            spoken = f" as {self._dialect.name}" if self._dialect else ""
            raise RewardRejected(f"{self.url} can't be used{spoken}: {error}") from error
        for name in (info.id, info.revision, *info.labels):
            if len(name) > MAX_NAME_CHARS or not name.isprintable():
                raise RewardRejected(
                    f"{self.url} describes its model with a name that can't be shown: {name[:80]!r}. Names are at most "
                    f"{MAX_NAME_CHARS} printable characters; look at what serves there"
                )
        if info.request_id not in (None, ids.get(MODEL_PATH)):
            raise self._not_ours(info.request_id, ids[MODEL_PATH], Exchange("GET", self.url + MODEL_PATH, ""))
        if info.request_id is None and self._dialect.name == "plaudit" and not self._warned_of_age:
            self._warned_of_age = True
            log.warning(
                "%s is a reward service from before request ids: its answers are not checked to belong to their "
                "requests. Update it when you can.",
                self.url,
            )
        self.info = info
        return info

    def _not_ours(self, came: str | None, sent: str, exchange: Exchange) -> Trouble:
        return Trouble(
            f"{self.url}: an answer to another request (request_id {came!r:.200} for {sent!r}); something between here "
            "and the service mixes answers up",
            exchange=exchange,
        )

    @property
    def needs(self) -> Sequence[str]:
        """Names of the fields that it requires; none before `describe`."""
        return self._dialect.needs(self.info) if self._dialect is not None and self.info is not None else ()

    @property
    def takes(self) -> Sequence[str]:
        """Names of optional fields, sent if a row has them."""
        return self._dialect.takes(self.info) if self._dialect is not None and self.info is not None else ()

    @property
    def conversations_per_request(self) -> int | None:
        """Maximum number of conversations in one request; None if there is no separate limit."""
        if self._dialect is None or self._renders(self.info):
            return None
        return self._dialect.conversations_per_request

    def _renders(self, info: ModelInfo | None) -> bool:
        """Whether the client renders conversations: the endpoint accepts only texts, or `render` is set."""
        assert self._dialect is not None
        asked = self._rendering is not None and self._dialect.name not in OWN_WRITING
        return asked or info is None or self._dialect.no_conversations(info) is not None

    def _sent(self, row: Row, info: ModelInfo) -> RewardItem:
        """The row in this endpoint's form. Raises `RewardRejected` if it can't accept the row, or a field is
        missing."""
        assert self._dialect is not None
        item = row.with_fields(self._dialect.needs(info), self._dialect.takes(info), self.url)
        if isinstance(item.prompt, str) or not self._renders(info):
            return item
        if self._rendering is None:
            raise RewardRejected(
                f"{self.url} takes texts, and the prompt of row {row.place} is a conversation: "
                f"{self._dialect.no_conversations(info)}. Or make texts of conversations here: --reward.render "
                "MODEL_OR_TEMPLATE"
            )
        return self._rendering(item, first_token=not self._dialect.adds_first_token)

    async def score(self, rows: Sequence[Row]) -> tuple[RewardResponse, Exchange]:
        """One finite reward per row, in order, and the exchange. Raises `Trouble` or `RewardRejected`."""
        info = self.info or await self.describe()
        assert self._dialect is not None
        label = self._component.label
        items = [self._sent(row, info) for row in rows]
        call = self._dialect.encode(items)
        exchange = Exchange("POST", self.url + call.path, call.body.decode())
        request_id = secrets.token_hex(8)
        body = await self._exchange(exchange, self._request_timeout_s, request_id)
        answered = self._answered(exchange, 200, {}, body)
        try:
            answer = self._dialect.decode(body, info)
        except BrokenBody as error:
            raise Trouble(f"{self.url}: broken answer ({error})", exchange=answered) from error
        except NoVerdict as error:
            raise NoScore(f"{self.url}: {error}", answered) from error
        except UnusableAnswer as error:
            raise RewardRejected(f"{self.url} answered something unusable: {error}", answered) from error
        if answer.request_id != request_id and (answer.request_id, info.request_id) != (None, None):
            self.info = None  # it may have been replaced by an older version
            raise self._not_ours(answer.request_id, request_id, answered)
        if len(answer.rewards) != len(items):
            raise RewardRejected(
                f"{self.url}: {len(items)} items were sent and {len(answer.rewards)} rewards came back", answered
            )
        if label is not None and answer.label != label:
            raise RewardRejected(f"{self.url}: label {label!r} was asked for and {answer.label!r} came back", answered)
        return answer, answered

    async def _exchange(self, exchange: Exchange, timeout_s: float, request_id: str) -> bytes:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(
                    exchange.method,
                    exchange.url,
                    content=exchange.request.encode() or None,
                    headers={REQUEST_ID_HEADER: request_id, WIRE_HEADER: str(WIRE_VERSION)}
                    | ({"Content-Type": "application/json"} if exchange.request else {}),
                    auth=self._auth,
                ) as response,
            ):
                try:
                    body, whole = await read(response, MAX_ANSWER_BYTES)
                except Unreadable as error:
                    if response.status_code == 200:
                        came = self._answered(exchange, 200, dict(response.headers), b"")
                        raise RewardRejected(f"{self.url}: {error}", came) from error
                    body, whole = b"", True  # the status says enough
                if await break_if_more_came(response):
                    log.warning("%s sent more than was asked for; the connection is closed", self.url)
        except TimeoutError as error:
            raise Trouble(
                f"{self.url}: no whole answer within {timeout_s:g} s{self._via}", exchange=exchange
            ) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            if _untrusted(error):
                raise RewardRejected(
                    f"{self.url}: its TLS certificate is not trusted ({error}). "
                    "Name the certificate authority's file with --reward.ca-file.",
                    exchange,
                ) from error
            raise Trouble(f"{self.url}: {_in_words(error)}{self._via}", exchange=exchange) from error
        status = response.status_code
        answered = self._answered(exchange, status, dict(response.headers), body)
        if status == 200 and not whole:
            raise RewardRejected(
                f"{self.url} answered with more than {MAX_ANSWER_BYTES} bytes, beginning {self._quote(body)}", answered
            )
        return self._accept(response, body, answered)

    def _accept(self, response: httpx.Response, body: bytes, exchange: Exchange) -> bytes:
        status = response.status_code
        if status == 200:
            kind = response.headers.get("content-type", "")
            if exchange.method == "POST" and "json" not in kind:
                raise RewardRejected(
                    f"{self.url} answered {kind or 'something untyped'} instead of JSON: a proxy, a login page or "
                    f"another server is in the way{self._via}: {self._quote(body)}",
                    exchange,
                )
            return body
        final = _no_use_in_another_try(body)
        passing = self._dialect.retried_statuses if self._dialect else frozenset()
        if not final and (status in RETRIED_STATUSES | passing or (status >= 500 and status not in (501, 505))):
            raise Trouble(
                f"{self.url}: {self._in_short(response, body)}{self._via}",
                retry_after_s=_retry_after_s(response),
                server_error=status == 500 or status in passing,
                exchange=exchange,
            )
        if response.is_redirect:
            raise RewardRejected(
                f"{exchange.url} redirects to {response.headers.get('location')}: give that address with --reward.url",
                exchange,
            )
        if status in (401, 403):
            raise RewardRejected(
                f"{exchange.url} refuses the credentials ({status} {response.reason_phrase}): put the key into "
                f"--reward.api-key-file or PLAUDIT_REWARD_API_KEY. {self._quote(body)}",
                exchange,
            )
        what = "can't score this, now or later" if final else "refuses the request"
        raise RewardRejected(f"{exchange.url} {what}: {self._in_short(response, body)}{self._via}", exchange)

    def _answered(self, exchange: Exchange, status: int, headers: dict[str, str], body: bytes) -> Exchange:
        """The exchange with its answer, without echoed secrets and without cookies."""
        kept = {name: without(value, self._secrets) for name, value in headers.items() if name in KEPT_HEADERS}
        answer = without(body.decode(errors="replace"), self._secrets)
        return Exchange(exchange.method, exchange.url, exchange.request, status, kept, answer)

    def _in_short(self, response: httpx.Response, body: bytes) -> str:
        said = f"{response.status_code} {response.reason_phrase}".strip()
        return ": ".join(filter(None, (said, self._quote(body))))

    def _quote(self, body: bytes) -> str:
        return without(_quote(body), self._secrets)


def _basic_auth(url: str) -> httpx.BasicAuth | None:
    """User name and password from the URL; they replace a bearer token."""
    parts = urlsplit(url)
    if parts.username is None:
        return None
    return httpx.BasicAuth(unquote(parts.username), unquote(parts.password or ""))


def _secrets(url: str, headers: httpx.Headers, component: RewardComponent) -> list[str]:
    """All credentials that are sent, in the forms in which a server may echo them."""
    parts = urlsplit(url)
    sent = [headers.get("authorization", "").removeprefix("Bearer "), unquote(parts.password or "")]
    sent += [line.partition(":")[2].strip() for line in component.header]
    long_enough = {secret for secret in sent if len(secret) >= SHORTEST_SECRET}
    return sorted(long_enough | {json.dumps(secret)[1:-1] for secret in long_enough}, key=len, reverse=True)


def _quote(body: bytes) -> str:
    """The part of an error's body to show: a problem document's detail, or the beginning of the text."""
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        return " ".join(body[: 4 * QUOTED_CHARS].decode(errors="replace").split())[:QUOTED_CHARS]
    labels = f" (labels: {', '.join(problem.labels)})" if problem.labels else ""
    return problem.detail[: 4 * QUOTED_CHARS] + labels[: 4 * QUOTED_CHARS]


def _no_use_in_another_try(body: bytes) -> bool:
    """Whether this is a problem document of a permanent failure, whatever its status."""
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        return False
    return problem.type in FINAL_PROBLEMS


def _retry_after_s(response: httpx.Response) -> float | None:
    """`Retry-After` in seconds, from either of its two forms (RFC 9110, 10.2.3).

    A date is relative to the answer's `Date` header, so clock differences don't matter.
    """
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        now = parsedate_to_datetime(response.headers["date"]) if "date" in response.headers else datetime.now(UTC)
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _in_words(error: Exception) -> str:
    kinds: dict[type[Exception], str] = {
        httpx.ConnectTimeout: "connecting timed out",
        httpx.ReadTimeout: "the answer timed out",
        httpx.PoolTimeout: "no free connection",
        httpx.ConnectError: "connection failed",
        httpx.ReadError: "connection lost",
        httpx.RemoteProtocolError: "connection lost",
        httpx.DecodingError: "broken answer",
    }
    kind = kinds.get(type(error), type(error).__name__)
    return f"{kind} ({error})" if str(error) else kind
