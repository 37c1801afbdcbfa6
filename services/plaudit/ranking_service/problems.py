"""The problems with which the ranking service refuses a request (RFC 9457)."""

from plaudit.serving.problems import ProblemDetailsError

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
"""The HTTP status of every problem, by the name in its `type`. Clients retry 408, 429 and 503."""

RETRY_AFTER_S = 5
"""Seconds after which to retry when the database was locked, full or unreachable."""


class ProblemError(ProblemDetailsError):
    """A refusal of the ranking service."""

    statuses = STATUS
