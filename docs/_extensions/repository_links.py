"""Links of the repository's Markdown that lead out of docs/: on the site they lead to the repository.

The same files are read on the code host, where `../../SECURITY.md` or `../decisions` is right. A link to a file that
does not exist stays as it is, and Sphinx reports it.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./|\./)?[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def to_the_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Rewrite the links in `source` that leave the documentation or lead to a directory."""
    page = Path(app.env.doc2path(docname))
    docs, root = Path(app.srcdir), Path(app.srcdir).parent

    def target(link: re.Match[str]) -> str:
        path = (page.parent / link["path"]).resolve()
        if not path.exists() or (path.is_file() and path.is_relative_to(docs)):
            return link[0]
        return f"{app.config.repository_url}/{path.relative_to(root)}{link['anchor'] or ''}"

    source[0] = LINK.sub(target, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value("repository_url", "", "env")
    app.connect("source-read", to_the_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
