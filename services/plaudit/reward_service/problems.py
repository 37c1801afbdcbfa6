"""What can go wrong with a request, as RFC 9457 problem documents. A refusal names its kind, and the item at fault."""

from typing import Any

from plaudit import wire

STATUS = {
    "malformed-request": 400,
    "malformed-body": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "request-timeout": 408,
    "reload-failed": 409,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "invalid-request": 422,
    "empty-items": 422,
    "too-many-items": 422,
    "text-too-long": 422,
    "no-tokens": 422,
    "strings-only": 422,
    "template-refused": 422,
    "unknown-label": 422,
    "label-required": 422,
    "queue-full": 429,
    "headers-too-large": 431,
    "scoring-failed": 500,
    "non-finite-score": 500,
    "internal-error": 500,
    "unknown-transfer-coding": 501,
    "draining": 503,
    "not-ready": 503,
    "out-of-memory": 503,
    "overloaded": 503,
    "too-many-connections": 503,
    "deadline-exceeded": 504,
}
"""Every problem there is, by the name in its `type`, with its HTTP status. Clients retry 408, 429, 503, 504; what
`wire.FINAL_PROBLEMS` names comes again with the same request."""

RETRY_AFTER_DRAIN_S = 1
MAX_DETAIL_CHARS = 2000
"""A detail may quote the request, which may have put megabytes there."""


class ProblemError(Exception):
    """A refusal on its way to the client. `extra` becomes further members of the document."""

    def __init__(
        self, name: str, detail: str, *, item: int | None = None, retry_after_s: int | None = None, **extra: Any
    ) -> None:
        if len(detail) > MAX_DETAIL_CHARS:
            detail = f"{detail[:MAX_DETAIL_CHARS]}…"
        super().__init__(detail)
        self.name = name
        self.status = STATUS[name]
        self.detail = detail
        self.item = item
        self.retry_after_s = retry_after_s
        self.extra = extra

    def document(self) -> wire.Problem:
        return wire.Problem(
            type=wire.problem_type(self.name),
            title=self.name.replace("-", " ").capitalize(),
            status=self.status,
            detail=self.detail,
            item=self.item,
            **self.extra,
        )

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def draining() -> ProblemError:
    """What is said to whoever comes, or still waits, while the service shuts down."""
    return ProblemError("draining", "the service is shutting down", retry_after_s=RETRY_AFTER_DRAIN_S)
