"""Settings as plain JSON values, for files."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plaudit.rewards.settings import RewardComponent, without_credentials
from plaudit.settings.data import OPENING_TOKENS, PromptSettings


def to_dict(config: object) -> dict[str, object]:
    """The config as nested dicts of JSON values, without passwords in URLs and without the values of headers."""

    def plain(value: object) -> object:
        if isinstance(value, RewardComponent):
            headers = tuple(f"{line.partition(':')[0]}: (not saved)" for line in value.header)
            value = dataclasses.replace(value, url=tuple(map(without_credentials, value.url)), header=headers)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names. Settings from earlier versions are converted to the current form."""
    settings = flat(config)
    openings = settings.get("prompts.column") is None and settings.get("prompts.messages_column") is None
    if openings and "prompts.max_tokens" in settings:
        # Earlier versions saved the default of openings explicitly.
        settings["prompts.max_tokens"] = settings["prompts.max_tokens"] or OPENING_TOKENS
    if settings.get("prompts.min_text_chars", 0) is None and "dataset.data" in settings:
        # Earlier versions had one default for every source.
        settings["prompts.min_text_chars"] = PromptSettings().shortest_text(settings["dataset.data"])
    return settings


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    return dict(_flat(config, ""))


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
