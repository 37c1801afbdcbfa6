"""Starting points: the settings that a run chooses for its model and data where none are given.

The rates are measured for the embedded models (2 million parameters). For GPT-2 and larger models they are what is
usual, and the first thing to change if a run learns too slowly or drifts (docs/how-to/learning-rate-and-kl.md).

Failure mode: a choice that depends on more than the model's size and the number of examples, so that a resumed run
would choose differently.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from plaudit.errors import ConfigError
from plaudit.settings.ppo import PPOHyperparameters, PPOSettings
from plaudit.settings.supervised import OptimizerSettings

BATCH_SIZE = 128
INIT_KL_COEF = 0.05
LEAST_STEPS = 50
"""PPO steps that a run takes at least, if none are given: a pass over a few hundred prompts is only two or three."""
FEW_STEPS = 100
"""Stages 1 and 2 pass over their examples more often if they would take fewer optimizer steps than this."""

Stage = Literal["sft", "classifier", "pairwise", "ppo"]
MILLION, BILLION = 10**6, 10**9
RATES: Mapping[Stage, tuple[tuple[float, float], ...]] = {
    "sft": ((10 * MILLION, 1e-3), (50 * MILLION, 3e-4), (400 * MILLION, 5e-5), (2 * BILLION, 2e-5)),
    "classifier": ((10 * MILLION, 5e-4), (50 * MILLION, 1e-4), (2 * BILLION, 2e-5)),
    "pairwise": ((10 * MILLION, 5e-4), (50 * MILLION, 1e-4), (2 * BILLION, 2e-5)),
    "ppo": ((10 * MILLION, 2.5e-4), (50 * MILLION, 5e-5), (400 * MILLION, 1e-5), (2 * BILLION, 2e-6)),
}
"""Learning rates for all parameters, each with the number of parameters below which it applies."""
LARGEST: Mapping[Stage, float] = {"sft": 1e-5, "classifier": 1e-5, "pairwise": 1e-5, "ppo": 1e-6}
"""The learning rate of larger models."""
ADAPTERS = 10.0
"""Low-rank adapters take a rate this many times as high."""
EPOCHS: Mapping[Stage, tuple[float, float]] = {"sft": (1.0, 3.0), "classifier": (2.0, 5.0), "pairwise": (2.0, 2.0)}
"""Passes over the examples: usual, and where these are few."""


def learning_rate(stage: Stage, parameters: int, *, adapters: bool) -> float:
    """The rate for a model of so many parameters, of which all are trained or only adapters."""
    rate = next((rate for below, rate in RATES[stage] if parameters < below), LARGEST[stage])
    return rate * ADAPTERS if adapters else rate


def mini_batch_of(batch_size: int, gradient_accumulation_steps: int, responses_per_prompt: int = 1) -> int:
    """The largest mini-batch of at most 128 samples that makes whole accumulation steps of the batch, and holds all
    responses to a prompt.

    Raises:
        ConfigError: the batch can't be divided so.
    """
    least = responses_per_prompt
    for size in range(min(batch_size, max(BATCH_SIZE, least)), 0, -1):
        if size % least == 0 and batch_size % (size * gradient_accumulation_steps) == 0:
            return size
    raise ConfigError(
        f"gradient_accumulation_steps={gradient_accumulation_steps} x responses_per_prompt={responses_per_prompt} does "
        f"not divide batch_size={batch_size}"
    )


def batch_for(samples: int, per_optimizer_step: int) -> int:
    """A batch of at most 128 samples, or of `per_optimizer_step` if that is more, where one pass over the prompts has
    so many: a power of two if it can be.

    Raises:
        ConfigError: there are fewer samples than that.
    """
    size = BATCH_SIZE
    while size > samples:
        size //= 2
    size = max(size // per_optimizer_step * per_optimizer_step, per_optimizer_step)
    if size > samples or samples == 0:
        raise ConfigError(
            f"{samples} samples, one pass over the prompts, are fewer than one batch of ppo.batch_size={size}"
        )
    return size


def chosen_ppo(
    settings: PPOSettings, before: Mapping[str, Any], *, parameters: int, adapters: bool, prompts: int
) -> tuple[PPOHyperparameters, str]:
    """The settings with the open ones chosen, and a line for the log; the line is "" if none were open.

    `before` holds the settings in the checkpoint that the run continues from: what was chosen then is kept.
    """
    kept = {name: before[name] for name in OPEN if before.get(name) is not None and getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **kept)
    chosen: dict[str, Any] = {}
    if settings.learning_rate is None:
        chosen["learning_rate"] = learning_rate("ppo", parameters, adapters=adapters)
    accumulated = settings.gradient_accumulation_steps
    batch_size = settings.batch_size
    if batch_size is None:
        least = settings.mini_batch_size or settings.responses_per_prompt
        samples = prompts * settings.responses_per_prompt
        batch_size = chosen["batch_size"] = batch_for(samples, least * accumulated)
    if settings.mini_batch_size is None:
        chosen["mini_batch_size"] = mini_batch_of(batch_size, accumulated, settings.responses_per_prompt)
    if settings.init_kl_coef is None:
        chosen["init_kl_coef"] = INIT_KL_COEF
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    what = f"{_size(parameters)} parameters, {'adapters' if adapters else 'all of them'} trained, {prompts} prompts"
    return PPOHyperparameters(**values | chosen), _line("ppo", chosen, what)


OPEN = ("learning_rate", "batch_size", "mini_batch_size", "init_kl_coef")
"""The fields of `PPOSettings` that a run chooses."""


def ppo_steps(steps_per_epoch: int) -> int:
    """The number of PPO steps if none is given: a pass over the prompts, but not fewer than `LEAST_STEPS`."""
    return max(steps_per_epoch, LEAST_STEPS)


def chosen_optimizer(
    settings: OptimizerSettings,
    before: Mapping[str, Any],
    stage: Stage,
    *,
    parameters: int,
    adapters: bool,
    examples: int,
) -> tuple[OptimizerSettings, str]:
    """`chosen_ppo` for the optimizer of stages 1 and 2, which train on `examples` rows or prompts."""
    names = ("learning_rate", "epochs")
    kept = {name: before[name] for name in names if before.get(name) is not None and getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **kept)
    chosen: dict[str, Any] = {}
    if settings.learning_rate is None:
        chosen["learning_rate"] = learning_rate(stage, parameters, adapters=adapters)
    if settings.epochs is None:
        usual, more = EPOCHS[stage]
        few = settings.max_steps is None and usual * examples / settings.batch_size < FEW_STEPS
        chosen["epochs"] = more if few else usual
    what = f"{_size(parameters)} parameters, {'adapters' if adapters else 'all of them'} trained, {examples} examples"
    return dataclasses.replace(settings, **chosen), _line("optimizer", chosen, what)


def _line(section: str, chosen: Mapping[str, Any], what: str) -> str:
    values = ", ".join(f"{section}.{name}={value:g}" for name, value in chosen.items())
    return f"chosen for {what}: {values}" if chosen else ""


def _size(parameters: int) -> str:
    return f"{parameters / BILLION:.1f} billion" if parameters >= BILLION else f"{parameters / MILLION:.1f} million"
