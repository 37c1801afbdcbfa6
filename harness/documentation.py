"""The code blocks of the documentation, and the list of those that no test executes."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
BLOCK = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    \S.*\n(?:^     .*\n)*)+", re.MULTILINE)
PROGRAMS = (
    *("plaudit", "plaudit-reward", "plaudit-rank", "python", "python3.11", "pip", "make", "docker", "curl", "pytest"),
    *("accelerate", "ray", "serve", "kubectl", "cd", "ls", "export", "kill", "printf"),
)
LISTED: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    (ROOT / "tests" / "documentation" / "examples.yaml").read_text()
)


@dataclass(frozen=True)
class Example:
    """A command of the shell, on one line, or a block of Python."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60]}"


def blocks(language: str) -> list[Example]:
    """All blocks of a language."""
    found = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text()):
            if match[2] == language:
                found.append(Example(str(page.relative_to(ROOT)), match[3]))
    return found


def is_of_the_shell(text: str) -> bool:
    """Whether a block without a language holds commands."""
    first = text.strip().split(maxsplit=1)
    return bool(first) and (first[0] in PROGRAMS or "=" in first[0] or first[0].startswith(".venv/bin/"))


def commands() -> list[Example]:
    """Every command of the shell: continued lines joined, comments gone."""
    found = []
    for block in [*blocks("bash"), *blocks("shell"), *(b for b in blocks("") if is_of_the_shell(b.text))]:
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            text = line.split("  #")[0].strip()
            if text and not text.startswith("#"):
                found.append(Example(block.page, text.removesuffix("&").strip()))
    return found


def listed(example: Example, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of the list that names a command or a block; None if a test here must execute it."""
    for entry in entries:
        if "pages" in entry and example.page not in entry["pages"]:
            continue
        if "page" in entry and example.page != entry["page"]:
            continue
        if "has" in entry and entry["has"] in example.text:
            return entry
        if any(example.text.startswith(begins) for begins in entry.get("begins", ())):
            return entry
    return None


def words(command: str) -> list[str]:
    """The words of a command, variables in front of it left out."""
    found = shlex.split(command, comments=True)
    while found and "=" in found[0] and not found[0].startswith("-"):
        found = found[1:]
    return found
