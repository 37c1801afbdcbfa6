"""The classic PPO API: the names of TRL 0.11's `PPOTrainer`, over Plaudit's own step.

    from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from plaudit.classic.core import LengthSampler

docs/how-to/coming-from-trl.md says what is different.
"""

from typing import Any

from plaudit.classic import core, extras, import_utils, models, trainer
from plaudit.classic.config import PPOConfig
from plaudit.classic.controllers import AdaptiveKLController, FixedKLController, RunningMoments
from plaudit.classic.core import LengthSampler, set_seed
from plaudit.classic.extras import BestOfNSampler
from plaudit.classic.models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from plaudit.classic.pipelines import pipeline
from plaudit.classic.removed import missing
from plaudit.classic.trainer import PPOTrainer

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RunningMoments",
    "core",
    "create_reference_model",
    "extras",
    "import_utils",
    "models",
    "pipeline",
    "set_seed",
    "trainer",
]


def __getattr__(name: str) -> Any:
    return missing(__name__, name)
