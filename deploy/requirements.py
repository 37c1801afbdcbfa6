"""Print what one half of the project needs, for `pip install -r`, without the project itself: the image's first layers.

python requirements.py reward > requirements.txt
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
