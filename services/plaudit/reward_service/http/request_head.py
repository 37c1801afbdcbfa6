"""What a connection and the head of a request are refused for, whichever protocol class parses them."""

from starlette.types import Scope

from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import MAX_HEAD_BYTES

SEPARATORS = len(b": \r\n")
OVER_CONNECTION_LIMIT = "plaudit.over_connection_limit"
"""In the scope of a request on a connection beyond `--max-connections`: a function that makes its refusal. Health
routes answer all the same."""


def head_too_large() -> ProblemError:
    return ProblemError("headers-too-large", f"request line and headers have more than {MAX_HEAD_BYTES} bytes")


def too_many_connections(bound: int) -> ProblemError:
    return ProblemError(
        "too-many-connections",
        f"{bound} connections are open, and that is the bound; health alone answers on this one. Keep connections and "
        "use them again, or come back later",
        retry_after_s=1,
    )


def head_bytes(scope: Scope) -> int:
    """The size of a complete head, about as it came over the wire."""
    headers = scope["headers"]
    return (
        sum([len(name) + len(value) for name, value in headers])
        + SEPARATORS * len(headers)
        + len(scope["path"])
        + len(scope["query_string"])
    )
