"""Refusals of a connection or of a request's head (request line and headers), for every HTTP parser in use."""

from starlette.types import Scope

from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import MAX_HEAD_BYTES

SEPARATORS = len(b": \r\n")
OVER_CONNECTION_LIMIT = "plaudit.over_connection_limit"
"""In the scope of a request on a connection beyond `--max-connections`: a function that makes its refusal. Health
routes answer all the same."""
REFUSED = "plaudit.refused"
"""In the scope of a request whose body turned out to be malformed: its refusal has been sent and counted already."""


def head_too_large() -> ProblemError:
    """The refusal of a request line and headers that are too large."""
    return ProblemError("headers-too-large", f"request line and headers have more than {MAX_HEAD_BYTES} bytes")


def too_many_connections(bound: int) -> ProblemError:
    """The refusal of a request on a connection beyond the bound."""
    return ProblemError(
        "too-many-connections",
        f"{bound} connections are open, the most that the service takes; only health routes answer on this one. Reuse "
        "connections, or retry later",
        retry_after_s=1,
    )


def head_bytes(scope: Scope) -> int:
    """The approximate size of a complete head on the wire."""
    headers = scope["headers"]
    return (
        sum([len(name) + len(value) for name, value in headers])
        + SEPARATORS * len(headers)
        + len(scope["path"])
        + len(scope["query_string"])
    )
