"""Who asks, and whether a browser was made to ask. Wrong here would be another site that ranks in somebody's name.

People come with a session cookie from a browser, or with their invitation as a bearer token from a program. A cookie
is sent by itself, so whatever writes also needs the session's CSRF token, and must come from this site.
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
    """Somebody who may rank, and how they came."""

    person: people.Person
    session: str | None
    """The session's token; None for a program with an invitation as bearer token."""

    @property
    def csrf(self) -> str:
        """What a form of this session carries. Nobody can tell the session from it, or it from the outside."""
        return "" if self.session is None else hashlib.sha256(b"csrf" + self.session.encode()).hexdigest()


class AccessControl:
    """Checks of keys, sessions and origins, for one service."""

    def __init__(self, database: Database, keys: Sequence[str], *, secure: bool, session_hours: float) -> None:
        self._database = database
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secure = secure
        self._session_ms = int(session_hours * HOUR_MS)
        # The prefix makes browsers refuse a cookie that another host of the domain has set.
        self._cookie = "__Host-plaudit" if secure else "plaudit"

    def caller(self, request: Request) -> Caller | None:
        """Whoever comes with a good session or invitation. Reads the database: not for the event loop."""
        token = bearer_token(request)
        if token is not None:
            with self._database.read() as connection:
                person = people.by_token(connection, token)
            if person is None:
                raise ProblemError("unauthorized", "the bearer token is no invitation; ask for a new link")
            return Caller(person, None)
        session = request.cookies.get(self._cookie)
        if session is None:
            return None
        with self._database.read() as connection:
            person = people.by_session(connection, session, now_ms())
        return None if person is None else Caller(person, session)

    def has_key(self, request: Request) -> bool:
        """Whether the request carries one of the administration's keys."""
        token = bearer_token(request)
        if token is None:
            return False
        presented = hashlib.sha256(token.encode()).digest()
        # Every key is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(presented, known) for known in self._keys]
        return any(matches)

    def require_admin(self, request: Request) -> Caller | None:
        """An administrator: a key, an admin's invitation as bearer token, or an admin's session. None for a key."""
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
        """Begin a session for the owner of this invitation, and give the browser its cookie."""
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
        """End the session."""
        if caller.session is not None:
            with self._database.write() as connection:
                people.end_session(connection, caller.session)
        response.delete_cookie(self._cookie, path="/", secure=self._secure, httponly=True, samesite="lax")


def bearer_token(request: Request) -> str | None:
    """What follows `Bearer` in the Authorization header."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def require_same_site(request: Request) -> None:
    """Refuse what another site made a browser send. Programs that say nothing about their origin pass."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise ProblemError("cross-site", f"a page of another site may not send this (Sec-Fetch-Site: {site})")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ProblemError("cross-site", f"a page of another site may not send this (Origin: {origin})")


def require_csrf(caller: Caller, sent: str) -> None:
    """Refuse a write by cookie without the session's own token."""
    if caller.session is not None and not hmac.compare_digest(caller.csrf.encode(), sent.encode()):
        raise ProblemError("csrf", "the page is from an earlier session; nothing is lost: check it and send it again")
