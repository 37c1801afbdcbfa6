"""The undocumented parts of other libraries that the service uses, each with a check and a fallback.

Any release may remove such a part or change what it does. So each is checked once, at start, on an input whose result
is known. Where the check fails, public code that is slower takes its place, and the log says so in one line.

Failure modes: a part that is still there and computes something else; a fallback that nobody notices.
"""

from collections.abc import Callable
from functools import cached_property

TESTED = {"torch": ("2.13", "2.14"), "uvicorn": ("0.54", "0.55"), "httptools": ("0.9", "0.10")}
"""The versions that the parts were written for and tested with: from the first, up to and without the second.

Other versions may work: the checks below decide. `tests/services/reward_service/test_private_apis.py` fails for an
installed version outside the range, and says what to look at before the range is widened.
"""


class PrivateApi:
    """One part: its name, what replaces it, and the check that decides. The check runs at most once."""

    def __init__(self, name: str, *, fallback: str, check: Callable[[], None]) -> None:
        """`check` raises any exception where the part is missing or gives a wrong result."""
        self.name = name
        self.fallback = fallback
        self._check = check
        _ALL.append(self)

    @cached_property
    def problem(self) -> str | None:
        """Why the part can't be used here, in one line; None if it can."""
        try:
            self._check()
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        return None

    @property
    def usable(self) -> bool:
        """Whether the part is there and gives the right result."""
        return self.problem is None

    @property
    def checked(self) -> bool:
        """Whether the check has run: a part that this service doesn't need is never checked."""
        return "problem" in self.__dict__


_ALL: list[PrivateApi] = []


def fallbacks() -> list[PrivateApi]:
    """The parts that were checked and are replaced by their fallback."""
    return [api for api in _ALL if api.checked and not api.usable]
