"""The policy that a run trained: from its results, or from one of its checkpoints, with the run's settings.

Failure mode: weights of a checkpoint on another base than the run's.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from plaudit.errors import ConfigError
from plaudit.policy.loading import load_policy
from plaudit.policy.model import Policy
from plaudit.run import checkpoint as checkpoints
from plaudit.settings.files import from_dict
from plaudit.settings.ppo import PPOConfig
from plaudit.stages.ppo_results import CONFIG_FILE, MERGED
from plaudit.stages.ppo_setup import CHECKPOINTS


@dataclass(frozen=True)
class Source:
    """A directory that holds a trained policy, and the settings of the run that wrote it."""

    directory: Path
    settings: PPOConfig
    is_checkpoint: bool


def settings_of(directory: str) -> PPOConfig | None:
    """The settings of the run that wrote this directory; None if it contains none.

    Raises:
        ConfigError: the settings can't be read.
    """
    path = Path(directory)
    if (path / checkpoints.MANIFEST).is_file():
        return from_dict(PPOConfig, checkpoints.read_checkpoint(path).config, path / checkpoints.MANIFEST)
    file = (path.parent if path.name == MERGED else path) / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    return from_dict(PPOConfig, recorded, file)


def find(directory: str) -> Source:
    """The results of a run, or its newest checkpoint if it has none yet; or the given checkpoint.

    Raises:
        ConfigError: it is no run and no checkpoint, or the run has no checkpoint yet.
    """
    path, settings = Path(directory), settings_of(directory)
    if settings is None:
        raise ConfigError(
            f"{directory!r} is no run of `plaudit ppo` and none of its checkpoints: it has no {CONFIG_FILE}"
        )
    if (path / checkpoints.MANIFEST).is_file():
        return Source(path, settings, is_checkpoint=True)
    if any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        return Source(path, settings, is_checkpoint=False)
    saved = checkpoints.list_checkpoints(path / CHECKPOINTS)
    if not saved:
        raise ConfigError(f"{directory!r} has neither results nor a checkpoint yet: let the run take more steps")
    return Source(saved[-1].directory, settings, is_checkpoint=True)


def load_checkpoint(settings: PPOConfig, directory: Path, device: torch.device | str) -> Policy:
    """The policy of a checkpoint, on the run's own base in full precision.

    Raises:
        ConfigError: the checkpoint lacks weights that the policy trains.
    """
    policy = load_policy(settings.policy, settings.lora, device=device, value_head=not settings.ppo.critic_free)
    saved = load_file(directory / checkpoints.WEIGHTS, device=str(device))
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in saved:
            raise ConfigError(f"{directory} has no weights for {name} of policy={settings.policy!r}")
        with torch.no_grad():
            parameter.copy_(saved[name])
    return policy
