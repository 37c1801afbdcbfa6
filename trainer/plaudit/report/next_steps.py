"""The commands that follow a finished stage, with its own data, prompts and rewards filled in. No heavy imports.

Failure mode: a command that doesn't parse, or that leaves out a setting on which the next stage's result depends.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.settings import files
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.demo import DemoConfig
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig

PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
PROMPT = "The film was"


def after(config: object, file: Path | None = None) -> str:
    """What to run next, for people; "" after a command that nothing follows. `file` is the command's --config."""
    steps = list(_steps(config, file if file is not None and files.has_stages(file) else None))
    return "\nNext:\n" + "\n".join(f"  {step}" for step in steps) if steps else ""


def _steps(config: object, file: Path | None) -> Iterator[str]:
    shared = f"--config {shlex.quote(str(file))}" if file is not None else None
    if isinstance(config, SFTConfig):
        data = shared or _joined(_flags(config.dataset, DataSettings()))
        directory = shlex.quote(str(config.output_dir))
        judge = data if shared else f"{data} --output-dir runs/judge"
        yield f"plaudit reward-model {judge}    # or serve a model that you have"
        yield f"plaudit ppo {shared}" if shared else f"plaudit ppo --policy {directory} {data} --reward.url {URL}"
    elif isinstance(config, RewardModelConfig):
        label = "" if config.kind == "pairwise" else f" --label {shlex.quote(config.label_names[-1])}"
        model, port = shlex.quote(str(config.output_dir)), _port(file)
        yield f"plaudit-reward --model {model}{label} --port {port} &"
        if shared:
            yield f"plaudit ppo {shared}"
        else:
            yield f"plaudit ppo --policy runs/sft {_joined(_flags(config.dataset, DataSettings()))} --reward.url {URL}"
    elif isinstance(config, PPOConfig) and not config.check:
        run = shlex.quote(str(config.output_dir))
        yield f"plaudit evaluate {shared or _joined(_evaluation(config))}"
        yield f'plaudit generate {run} "{PROMPT}"'
        yield f"plaudit export {run} my-model    # a plain model for other programs"
    elif isinstance(config, EvaluateConfig) and config.by_people is None:
        yield f"open {config.output_dir / 'report.html'}"
        yield f'plaudit generate {shlex.quote(config.after)} "{PROMPT}"'
    elif isinstance(config, DemoConfig):
        yield f"open {config.output_dir / 'report.html'}"
        yield f'plaudit generate {shlex.quote(str(config.output_dir / "ppo"))} "{PROMPT}"'
        yield "plaudit init my_reviews.csv    # the same with your own data"


def _port(file: Path | None) -> int:
    """The port on this machine at which PPO will look for the reward service, by its part of the settings file."""
    if file is not None:
        with contextlib.suppress(ConfigError):
            addresses = [urlsplit(url) for part in files.load(PPOConfig, file).reward.components for url in part.url]
            for address in addresses:
                if address.port and address.hostname in ("localhost", "127.0.0.1", "::1"):
                    return address.port
    return PORT


def _evaluation(config: PPOConfig) -> Iterator[str]:
    yield from ("--after", str(config.output_dir))
    yield from _flags(config.dataset, DataSettings())
    yield from _flags(config.prompts, PromptSettings(), "prompts.")
    yield from _flags(config.generation, GenerationSettings(), "generation.")
    yield from _reward(config.reward)


def _reward(reward: RewardSettings) -> Iterator[str]:
    """The flags of a single reward. Several are a list in a settings file, which the command then needs as well."""
    if len(reward.components) != 1:
        yield from ("--config", "FILE")
        return
    (component,) = reward.components
    for name in ("url", "function", "kind", "label", "label_index", "model", "api_key_file"):
        value, usual = getattr(component, name), getattr(type(component)(), name)
        if value != usual:
            yield f"--reward.{name.replace('_', '-')}"
            yield from map(str, value) if isinstance(value, tuple) else (str(value),)


def _flags(section: object, usual: object, prefix: str = "") -> Iterator[str]:
    """The flags of the settings that are not the usual ones."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if value != getattr(usual, field.name):
            yield f"--{prefix}{field.name.replace('_', '-')}"
            yield from map(str, value) if isinstance(value, tuple) else (str(value),)


def _joined(flags: Iterator[str]) -> str:
    return shlex.join(flags)
