"""Settings as plain values, for files."""

import dataclasses
from pathlib import Path

from plaudit.rewards.settings import RewardComponent, without_credentials


def to_dict(config: object) -> dict[str, object]:
    """A config as plain JSON values, nested as its dataclasses are; without passwords in URLs and headers' values."""

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
