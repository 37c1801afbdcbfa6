"""What all model cards (README.md) share: the hub's metadata, and the settings."""

from collections.abc import Sequence

import yaml

from plaudit.run.hub import front_matter
from plaudit.settings.plain import to_dict


def settings_block(config: object) -> str:
    """All settings as YAML, without credentials."""
    return f"```yaml\n{yaml.safe_dump(to_dict(config), sort_keys=False).strip()}\n```"


def stage_card(
    config: object, title: str, text: str, *, base: str | None, library: str, pipeline: str, tags: Sequence[str]
) -> str:
    """The card of a result of stage 1 or 2: metadata, title, text, settings."""
    front = front_matter(base, library=library, pipeline=pipeline, tags=tags)
    return f"{front}\n\n# {title}\n\n{text}\n\n{settings_block(config)}\n"
