"""Tables in the documents: each says when and on what it was measured, and the program that measures it replaces it."""

import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def measured_on(*packages: str, cores: int = 1) -> str:
    """The date, the kind of machine, and the versions of these packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    used = "one core" if cores == 1 else f"{cores} cores"
    return f"{datetime.now(UTC):%Y-%m-%d}, {used} of {_machine()}, {versions}"


def _machine() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.*)$", described, re.MULTILINE)
    wide = next((words for flag, words in _VECTORS.items() if re.search(rf"\b{flag}\b", described)), "without AVX2")
    return f"{name[1] if name else platform.machine()} ({wide})"


_VECTORS = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def put(document: Path, name: str, lines: Sequence[str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in a document.

    Raises:
        ValueError: the document has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = document.read_text()
    head, began, rest = text.partition(begin)
    _, ended, tail = rest.partition(end)
    if not began or not ended:
        raise ValueError(f"{document} has no lines {begin.strip()!r} and {end!r} for the table to stand between")
    document.write_text("".join([head, begin, *(f"{line}\n" for line in lines), end, tail]))
