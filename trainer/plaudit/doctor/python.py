"""The Python version, the extras, and a notebook's progress bars."""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement

from plaudit.doctor.findings import Finding, note, ok, wrong

OLDEST = (3, 11)
NEWEST = (3, 13)
EXTRAS = {
    "trainer": "the stages of `plaudit`",
    "reward": "the reward service, `plaudit-reward`",
    "rank": "the ranking service, `plaudit-rank`",
}


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """The interpreter's version, and whether it is an environment of its own."""
    text = ".".join(map(str, version))
    if version[:2] < OLDEST:
        needed = ".".join(map(str, OLDEST))
        yield wrong("python", f"{text} is too old: Plaudit needs {needed}", f"python{needed} -m venv .venv")
    elif version[:2] > NEWEST:
        newest = ".".join(map(str, NEWEST))
        yield note("python", f"{text} is newer than the tested {newest}; packages may lack builds for it")
    else:
        yield ok("python", f"{text} at {sys.executable}")


def check_extras() -> Iterator[Finding]:
    """For each extra: packages that are missing, or older or newer than Plaudit declares. The trainer's are needed."""
    try:
        declared = metadata.requires("plaudit") or []
    except metadata.PackageNotFoundError:
        yield note("extras", "Plaudit itself is not installed as a package, so nothing says what it needs")
        return
    for extra, what in EXTRAS.items():
        problems = sorted(_problems(declared, extra))
        fix = f"pip install 'plaudit[{extra}]'"
        if not problems:
            yield ok("extras", f"plaudit[{extra}]: {what}")
        elif extra == "trainer":
            yield wrong("extras", f"plaudit[{extra}] ({what}): {', '.join(problems)}", fix)
        else:
            yield note("extras", f"plaudit[{extra}] ({what}) is not complete: {', '.join(problems[:4])}", fix)


def _problems(declared: list[str], extra: str) -> Iterator[str]:
    for line in declared:
        requirement = Requirement(line)
        environment = {"extra": extra}
        if requirement.marker is None or not requirement.marker.evaluate(environment):
            continue
        if requirement.name == "plaudit":
            for other in requirement.extras:
                yield from _problems(declared, other)
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found} is not {requirement.specifier}"


def check_notebook(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether a notebook can show progress bars."""
    inside = "ipykernel" in sys.modules or "JPY_PARENT_PID" in environment or "JPY_SESSION_NAME" in environment
    if not inside and importlib.util.find_spec("ipykernel") is None:
        yield ok("notebook", "none here")
    elif importlib.util.find_spec("ipywidgets") is None:
        yield wrong(
            "notebook",
            "ipywidgets is missing, without which a notebook shows no progress bars (IProgress not found)",
            "pip install ipywidgets, then restart the notebook",
        )
    else:
        yield ok("notebook", "ipywidgets is there")
