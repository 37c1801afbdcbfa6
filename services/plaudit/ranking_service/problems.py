"""What can go wrong with a request, as RFC 9457 problem documents. A refusal names its kind, and what is at fault."""

from typing import Any

STATUS = {
    "malformed-body": 400,
    "unauthorized": 401,
    "session-ended": 401,
    "forbidden": 403,
    "cross-site": 403,
    "csrf": 403,
    "not-found": 404,
    "unknown-invitation": 404,
    "method-not-allowed": 405,
    "request-timeout": 408,
    "edited-elsewhere": 409,
    "key-reused": 409,
    "nothing-to-undo": 409,
    "batch-differs": 409,
    "batch-closed": 409,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "invalid-request": 422,
    "invalid-row": 422,
    "unknown-answer": 422,
    "rank-out-of-range": 422,
    "incomplete-ranking": 422,
    "too-many-requests": 429,
    "internal-error": 500,
    "store-unavailable": 503,
    "draining": 503,
    "not-ready": 503,
}
"""Every problem there is, by the name in its `type`, with its HTTP status. Clients retry 408, 429 and 503."""

CONTENT_TYPE = "application/problem+json"
RETRY_AFTER_S = 5
"""When to come again after the database was locked, full or gone."""


class ProblemError(Exception):
    """A refusal on its way to whoever asked. `extra` becomes further members of the document."""

    def __init__(self, name: str, detail: str, *, retry_after_s: int | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.name = name
        self.status = STATUS[name]
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = extra

    def document(self) -> dict[str, Any]:
        return {
            "type": f"urn:plaudit:problem:{self.name}",
            "title": self.name.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers
