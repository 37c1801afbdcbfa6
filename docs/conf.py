"""The documentation site. `make docs` builds it; a warning is an error. Nothing is fetched from a network."""

import sys
import tomllib
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The checkout, also where another version is installed.
sys.path[:0] = [str(Path(__file__).parent / "_extensions"), str(ROOT / "trainer"), str(ROOT / "services"), str(ROOT)]
warnings.filterwarnings("ignore", category=DeprecationWarning)

project = "Plaudit"
author = "the Plaudit maintainers"
copyright = author  # noqa: A001
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx_copybutton", "repository_links", "generated_references"]
myst_enable_extensions = ["html_image", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
# A relative link that leads out of docs/ becomes a link to the repository (repository_links.py).
repository_url = "https://github.com/plaudit/plaudit/blob/main"
exclude_patterns = ["_extensions"]
default_role = "code"
nitpicky = False
highlight_language = "none"
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = "Plaudit"
html_static_path = ["_static"]
html_css_files = ["plaudit.css"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5d75", "color-brand-content": "#0b5d75"},
    "dark_css_variables": {"color-brand-primary": "#6cc3dc", "color-brand-content": "#6cc3dc"},
}
