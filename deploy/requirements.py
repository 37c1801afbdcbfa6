"""Print the requirements of some extras, without the project itself, for `pip install -r` in the images' first layers.

python requirements.py reward otel > requirements.txt
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def needs(extra: str) -> list[str]:
    """An extra's requirements, with those of the extras that it includes as `plaudit[...]`."""
    found = []
    for need in project["optional-dependencies"][extra]:
        included = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", need)
        found += [n for name in included[1].split(",") for n in needs(name)] if included else [need]
    return found


print(*project["dependencies"], *(need for extra in sys.argv[1:] for need in needs(extra)), sep="\n")
