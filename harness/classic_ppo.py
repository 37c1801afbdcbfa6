"""The recorded runs of the classic trainer: what went in, and what came out of each of three steps."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from harness.tiny_models import tiny_tokenizer
from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from plaudit.learner.stepper import PPOStepper, StepResult
from plaudit.policy.model import Policy
from plaudit.settings.ppo import PPOHyperparameters

DIRECTORY = Path(__file__).parents[1] / "tests" / "fixtures" / "classic_ppo"
CASES = sorted(path.stem for path in DIRECTORY.glob("*.safetensors"))
KEY_BIAS = " (keys)"
"""Ends the name of a bias of attention's keys. It adds the same number to all scores of a query: softmax drops it, and
its gradient is 0 but for rounding."""
INTERMEDIATES = ("logprobs", "ref_logprobs", "values", "kls", "non_score_rewards", "rewards", "advantages", "returns")
COLUMNS = ("intermediates", "statistics", "kl_coef", "weights", "key_bias")


@dataclass(frozen=True)
class Recording:
    """One case. Recorded tensors have the classic shape: [B, L - 1] over the padded row, aligned by its `mask`."""

    name: str

    @cached_property
    def case(self) -> dict[str, Any]:
        with safe_open(DIRECTORY / f"{self.name}.safetensors", "pt") as file:
            case: dict[str, Any] = json.loads(file.metadata()["case"])
            return case

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        with safe_open(DIRECTORY / f"{self.name}.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @property
    def config(self) -> PPOHyperparameters:
        known = {field.name for field in dataclasses.fields(PPOHyperparameters)}
        return PPOHyperparameters(**{name: value for name, value in self.case["config"].items() if name in known})

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def language_model(self, weights: dict[str, Tensor]) -> GPT2LMHeadModel:
        # Dropout stays at GPT-2's own 0.1: the policy has to switch it off.
        config = GPT2Config(
            vocab_size=self.case["vocab_size"],
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
        return model

    def models(self) -> tuple[Any, dict[str, Tensor], Any]:
        """The starting policy, its value head's weight and bias, and the reference; None for adapters switched off."""
        lora, recorded = self.case["lora"], self.part("policy/")
        head = {n: t for n, t in recorded.items() if n.startswith("v_head.")}
        weights = {n: t for n, t in recorded.items() if n not in head}
        head = {n.removeprefix("v_head.summary."): t for n, t in head.items()}
        if lora is None:
            return self.language_model(weights), head, self.language_model(self.part("initial/"))
        settings = peft.LoraConfig(**lora, fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(self.language_model(self.part("initial/")), settings)
        result = model.load_state_dict(
            {n.removeprefix("pretrained_model."): t for n, t in weights.items()}, strict=False
        )
        assert not result.unexpected_keys
        return model, head, None

    def stepper(self) -> PPOStepper:
        """A stepper over the recorded start."""
        model, head, reference = self.models()
        policy = Policy(model)
        policy.v_head.load_state_dict(head)
        return PPOStepper(policy, reference, self.config)

    def classic_trainer(self) -> PPOTrainer:
        """The classic API's trainer over the recorded start."""
        model, head, reference = self.models()
        wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model)
        wrapper.v_head.summary.load_state_dict(head)
        if reference is not None:
            reference = AutoModelForCausalLMWithValueHead.from_pretrained(reference)
        known = {field.name for field in dataclasses.fields(PPOConfig)}
        config = PPOConfig(**{name: value for name, value in self.case["config"].items() if name in known})
        return PPOTrainer(config, wrapper, reference, tiny_tokenizer())

    def classic_step(self, trainer: PPOTrainer, step: int) -> dict[str, Any]:
        """`PPOTrainer.step` as the recording took it; returns its statistics."""
        samples = range(trainer.config.batch_size)
        return trainer.step(
            [self.tensors[f"step{step}/query/{i}"] for i in samples],
            [self.tensors[f"step{step}/response/{i}"] for i in samples],
            list(self.tensors[f"step{step}/scores"]),
            minibatch_permutations=self.case["steps"][step]["minibatch_permutations"],
        )

    def run_step(self, stepper: PPOStepper, step: int) -> StepResult:
        samples = range(stepper.config.batch_size)
        return stepper.step(
            [self.tensors[f"step{step}/query/{i}"] for i in samples],
            [self.tensors[f"step{step}/response/{i}"] for i in samples],
            self.tensors[f"step{step}/scores"],
            self.case["steps"][step]["minibatch_permutations"],
        )

    def intermediate_differences(self, result: StepResult, step: int) -> dict[str, float]:
        """Largest absolute difference of each recorded tensor, over real tokens."""
        recorded_mask = self.tensors[f"step{step}/mask"].bool()
        differences = {
            name: (getattr(result, name)[result.mask] - self.tensors[f"step{step}/{name}"][recorded_mask])
            .abs()
            .max()
            .item()
            for name in INTERMEDIATES
            if f"step{step}/{name}" in self.tensors
        }
        used = self.tensors[f"step{step}/scores_used"]
        return differences | {"scores": (result.scores - used).abs().max().item()}

    def statistic_differences(self, result: StepResult, step: int) -> dict[str, float]:
        """Difference of each recorded statistic, relative to its size where that is more than 1."""
        recorded = self.case["steps"][step]["stats"]
        return {n: abs(result.statistics[n] - value) / max(abs(value), 1.0) for n, value in recorded.items()}

    def weights(self, stepper: PPOStepper) -> dict[str, nn.Parameter]:
        """The stepper's weights under their recorded names."""
        own = {f"pretrained_model.{n}": p for n, p in stepper.policy.model.named_parameters()}
        return own | {f"v_head.summary.{n}": p for n, p in stepper.policy.v_head.named_parameters()}

    def restore_weights(self, stepper: PPOStepper, step: int) -> None:
        """Puts the weights that were recorded after a step into the policy."""
        own = self.weights(stepper)
        for name, weight in self.part(f"after_step{step}/").items():
            own[name].data.copy_(weight)

    def weight_distances(self, stepper: PPOStepper, step: int) -> dict[str, Tensor]:
        """How far each weight is from its recording after the step; the biases of attention's keys stand apart."""
        own = self.weights(stepper)
        distances = {n: (own[n].detach() - weight).abs() for n, weight in self.part(f"after_step{step}/").items()}
        for name in [name for name in distances if name.endswith("c_attn.bias")]:
            query, key, value = distances[name].chunk(3)
            distances |= {name: torch.cat([query, value]), name + KEY_BIAS: key}
        return distances


def reproduce(name: str) -> dict[str, float]:
    """Worst difference of a case, over three steps: intermediates, statistics, KL coefficient, weights at the end."""
    recording = Recording(name)
    stepper = recording.stepper()
    worst = dict.fromkeys(COLUMNS, 0.0)
    for step, recorded in enumerate(recording.case["steps"]):
        result = recording.run_step(stepper, step)
        assert len(result.minibatch_permutations) == len(recorded["minibatch_permutations"])
        worst["intermediates"] = max(worst["intermediates"], *recording.intermediate_differences(result, step).values())
        worst["statistics"] = max(worst["statistics"], *recording.statistic_differences(result, step).values())
        worst["kl_coef"] = max(worst["kl_coef"], abs(stepper.kl_coef - recorded["kl_coef_after"]))
    distances = {name: distance.max().item() for name, distance in recording.weight_distances(stepper, 2).items()}
    return worst | {
        "weights": max(d for name, d in distances.items() if not name.endswith(KEY_BIAS)),
        "key_bias": max((d for name, d in distances.items() if name.endswith(KEY_BIAS)), default=0.0),
    }
