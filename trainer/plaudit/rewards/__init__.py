"""Rewards over HTTP. A failure is an exception, never a number, because a policy would train on a made-up reward too.

`plaudit[client]` installs the dependencies. The names below are imported on first use, so settings can be read without
an HTTP library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plaudit.rewards.client import RewardClient, Scores
    from plaudit.rewards.errors import RewardError, RewardRejected, RewardUnavailable
    from plaudit.rewards.remote_reward import RemoteReward
    from plaudit.rewards.settings import JudgeSettings, RewardComponent, RewardSettings

__all__ = [
    "JudgeSettings",
    "RemoteReward",
    "RewardClient",
    "RewardComponent",
    "RewardError",
    "RewardRejected",
    "RewardSettings",
    "RewardUnavailable",
    "Scores",
]

_HOMES = {
    "JudgeSettings": "settings",
    "RemoteReward": "remote_reward",
    "RewardClient": "client",
    "RewardComponent": "settings",
    "RewardError": "errors",
    "RewardRejected": "errors",
    "RewardSettings": "settings",
    "RewardUnavailable": "errors",
    "Scores": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
