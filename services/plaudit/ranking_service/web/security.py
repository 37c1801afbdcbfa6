"""Authentication, and protection against cross-site request forgery (CSRF).

A browser sends a session cookie, a program its invitation as a bearer token. Browsers attach the cookie to every
request, also to those that another site starts. Writes with a cookie therefore need the session's CSRF token and an
origin that is this site.

Failure modes: another site ranks in a person's name.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request, Response

from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import people
from plaudit.ranking_service.store.database import Database, now_ms

HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Caller:
    """An authenticated person, and their session."""

    person: people.Person
    session: str | None
    """The session's token; None for a program with a bearer token."""

    @property
    def csrf(self) -> str:
        """The CSRF token in this session's forms: a hash of the session's token, which it doesn't reveal."""
        return "" if self.session is None else hashlib.sha256(b"csrf" + self.session.encode()).hexdigest()


class AccessControl:
    """Checks of keys and sessions, for one service."""

    def __init__(self, database: Database, keys: Sequence[str], *, secure: bool, session_hours: float) -> None:
        self._database = database
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secure = secure
        self._session_ms = int(session_hours * HOUR_MS)
        # With this prefix, browsers refuse a cookie set by another host of the domain.
        self._cookie = "__Host-plaudit" if secure else "plaudit"

    def caller(self, request: Request) -> Caller | None:
        """The person with a valid session or invitation; None without a session.

        Raises `ProblemError` for an invalid bearer token. Reads the database: don't call on the event loop.
        """
        token = bearer_token(request)
        if token is not None:
            with self._database.read() as connection:
                person = people.by_token(connection, token)
            if person is None:
                raise ProblemError("unauthorized", "the bearer token is not a valid invitation; ask for a new link")
            return Caller(person, None)
        session = request.cookies.get(self._cookie)
        if session is None:
            return None
        with self._database.read() as connection:
            person = people.by_session(connection, session, now_ms())
        return None if person is None else Caller(person, session)

    def has_key(self, request: Request) -> bool:
        """Whether the request carries a valid API key."""
        token = bearer_token(request)
        if token is None:
            return False
        presented = hashlib.sha256(token.encode()).digest()
        # Every key is compared, in constant time, so that the time doesn't tell which one nearly matched.
        matches = [hmac.compare_digest(presented, known) for known in self._keys]
        return any(matches)

    def require_admin(self, request: Request) -> Caller | None:
        """Require an API key (returns None), or a person with the admin role. Raises `ProblemError`."""
        if self.has_key(request):
            return None
        caller = self.caller(request)
        if caller is None:
            hint = (
                ""
                if self._keys
                else "; the service has no key: set RANK_API_KEY, or `plaudit-rank invite --role admin`"
            )
            raise ProblemError("unauthorized", f"send a valid key as `Authorization: Bearer KEY`{hint}")
        if caller.person.role != "admin":
            raise ProblemError("forbidden", "only an administrator may do this")
        return caller

    def sign_in(self, token: str, response: Response) -> people.Person | None:
        """Begin a session for the owner of this invitation, and set the cookie; None if the token is invalid."""
        now = now_ms()
        with self._database.write() as connection:
            person = people.by_token(connection, token)
            if person is None:
                return None
            session = people.begin_session(connection, person, now, self._session_ms)
        response.set_cookie(
            self._cookie,
            session,
            max_age=self._session_ms // 1000,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite="lax",
        )
        return person

    def sign_out(self, caller: Caller, response: Response) -> None:
        """End the session, and delete the cookie."""
        if caller.session is not None:
            with self._database.write() as connection:
                people.end_session(connection, caller.session)
        response.delete_cookie(self._cookie, path="/", secure=self._secure, httponly=True, samesite="lax")


def bearer_token(request: Request) -> str | None:
    """The token after `Bearer` in the Authorization header; None without one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def require_same_site(request: Request) -> None:
    """Refuse a request that another site made a browser send. Programs, which name no origin, pass."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise ProblemError("cross-site", f"a page of another site may not send this (Sec-Fetch-Site: {site})")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ProblemError("cross-site", f"a page of another site may not send this (Origin: {origin})")


def require_csrf(caller: Caller, sent: str) -> None:
    """Refuse a write with a cookie but without the session's CSRF token."""
    if caller.session is not None and not hmac.compare_digest(caller.csrf.encode(), sent.encode()):
        raise ProblemError("csrf", "the page is from an earlier session; nothing is lost: check it and send it again")
