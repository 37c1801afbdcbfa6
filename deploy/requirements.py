"""Print what one half of the project needs, for `pip install -r`, without the project itself: the image's first layers.

python requirements.py reward otel > requirements.txt
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [need for name in sys.argv[1:] for need in project["optional-dependencies"][name]]
print(*project["dependencies"], *extras, sep="\n")
