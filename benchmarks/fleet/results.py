"""Result files: one JSON document a point, rounded, written whole."""

import json
from pathlib import Path
from typing import Any

from plaudit import atomic


def write(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file. Numbers keep four significant digits more than they deserve."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(path, json.dumps(_rounded(document), indent=1) + "\n")


def read(directory: Path) -> list[dict[str, Any]]:
    """All documents of a directory, by name."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
