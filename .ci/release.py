"""`check TAG`: TAG is the version in pyproject.toml, with a dated section in CHANGELOG.md. `notes TAG`: that section.

The version is written in pyproject.toml alone, so that a clone without tags, an sdist and an image build without git.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problem(tag: str, version: str, changelog: str) -> str | None:
    """What keeps `tag` from being released; None if nothing does."""
    if tag != f"v{version}":
        return f"the tag is {tag!r} and pyproject.toml has version {version!r}: tag v{version}, or change the version"
    if section(version, changelog) is None:
        return f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD': rename 'Unreleased' and give it a date"
    return None


def section(version: str, changelog: str) -> str | None:
    """The text of the version's dated section of the changelog."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$\n(.*?)(?=^## \[|\Z)"
    found = re.search(heading, changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else None


def main() -> str | None:
    """The console program: nothing printed and exit code 0 if all is well."""
    command, tag = sys.argv[1:]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    found = problem(tag, version, changelog)
    if found is None and command == "notes":
        print(section(version, changelog))
    return found


if __name__ == "__main__":
    sys.exit(main())
