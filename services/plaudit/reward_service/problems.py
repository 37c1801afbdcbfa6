"""The problems with which the reward service refuses a request (RFC 9457)."""

from plaudit.serving.problems import ProblemDetailsError

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
"""The HTTP status of every problem, by the name in its `type`.

Clients retry 408, 429, 503 and 504. The same request fails again with the problems in `wire.FINAL_PROBLEMS`.
"""

RETRY_AFTER_DRAIN_S = 1


class ProblemError(ProblemDetailsError):
    """A refusal of the reward service."""

    statuses = STATUS


def draining() -> ProblemError:
    """The refusal of new and of unanswered requests during shutdown."""
    return ProblemError("draining", "the service is shutting down", retry_after_s=RETRY_AFTER_DRAIN_S)
