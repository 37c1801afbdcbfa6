"""Files are UTF-8 whatever the locale: every file that is opened as text says so."""

import ast
from pathlib import Path

import pytest

import plaudit.stages

SOURCES = sorted(Path(plaudit.stages.__path__[0]).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_opened_as_text_names_its_encoding(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        of_os = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "os"
        named = {keyword.arg for keyword in node.keywords}
        of_an_url = "timeout" in named
        binary = name == "open" and (of_os or of_an_url or any("b" in mode for mode in modes if len(mode) <= 3))
        ours = name == "write_text" and isinstance(node.func, ast.Name)  # plaudit.run.storage's
        if name in ("open", "read_text", "write_text") and not binary and not ours:
            assert "encoding" in named, f"{path}:{node.lineno}"
