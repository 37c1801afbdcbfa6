"""The smallest PPO step: four samples, and a stepper over a tiny policy whose adapters and value head are not zero."""

from typing import Any

import torch

from harness.tiny_models import ARCHITECTURES
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.adapters import add_lora
from plaudit.policy.model import Policy
from plaudit.policy.samples import Rollout, Samples
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOHyperparameters

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], [27], [28, 29, 30]]
SCORES = [1.0, -2.0, 0.5, 3.0]
CONFIG = PPOHyperparameters(batch_size=4, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-3)


def make_policy(architecture: str = "gpt2", seed: int = 0, *, value_head: bool = True) -> Policy:
    """A tiny policy whose adapters and value head are not zero, as fresh ones would be."""
    torch.manual_seed(seed)
    policy = Policy(add_lora(ARCHITECTURES[architecture](seed), LoraSettings(r=4, alpha=8)), value_head=value_head)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name or "v_head" in name:
                parameter.normal_(std=0.1)
    return policy


def make_stepper(config: PPOHyperparameters = CONFIG, **options: Any) -> PPOStepper:
    """A fresh stepper over `make_policy()`, held to its own weights without the adapters."""
    return PPOStepper(make_policy(), None, config, **options)


def weights(stepper: PPOStepper) -> dict[str, torch.Tensor]:
    """Copies of everything that learns."""
    return {name: p.detach().clone() for name, p in stepper.policy.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether these are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rollout_of(stepper: PPOStepper) -> Rollout:
    """The four samples as this stepper's policy and reference see them, with `SCORES`."""
    samples = Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)
    return stepper.evaluate(samples).with_scores(torch.tensor(SCORES))
