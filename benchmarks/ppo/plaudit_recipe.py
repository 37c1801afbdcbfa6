"""Plaudit's PPO step, timed: a contestant of `benchmarks.ppo.step`, in a process of its own.

Rewards come over HTTP from a service that this process starts. Prints a JSON line for each step: seconds a phase, the
processor time of trainer and service together, samples, response tokens, the peak memory of both, and the operations
that each phase cannot do without.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.ppo.peaks import peak_resident_mib
from plaudit.data.prompts import Prompts
from plaudit.learner.memory import keep_freed_memory, measuring_peak
from plaudit.learner.rollout import collect_rollout, sampler
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.generation import Draws
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.samples import Samples
from plaudit.policy.texts import prompt_texts
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
from plaudit.run.service_process import reward_service
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters


class Timed:
    """Adds up the seconds spent in a function."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.seconds = 0.0
        self._function, self._device = function, device

    def __call__(self, *args: Any, **options: Any) -> Any:
        began = now(self._device)
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += now(self._device) - began


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Steps:
    """Plaudit's step on one set of models, and the reward service's process."""

    def __init__(
        self, arguments: argparse.Namespace, prompts: Prompts, client: RewardClient, service: psutil.Process
    ) -> None:
        torch.manual_seed(0)
        keep_freed_memory()
        lora = LoraSettings(r=arguments.lora_r, alpha=2 * arguments.lora_r) if arguments.lora_r else LoraSettings(False)
        settings = ModelSettings(bf16=arguments.bf16, compile=arguments.compile, value_model=arguments.value_model)
        self.policy = load_policy(arguments.policy, lora, settings, device=arguments.device)
        count = arguments.batch_size
        self.stepper = PPOStepper(self.policy, None, PPOHyperparameters(batch_size=count, mini_batch_size=count))
        self._tokenizer = load_tokenizer(arguments.policy)
        self._prompts, self._client, self._service = prompts, client, service
        length = arguments.response_length
        fixed = {"min_new_tokens": length, "max_new_tokens": length, "draw_lengths": False} if length else {}
        self._generation = GenerationSettings(batch_size=arguments.chunk, **fixed)
        self._sample = sampler(self.policy, self._generation, self._tokenizer)
        self._loading_peak_mib = peak_resident_mib()

    def step(self, index: int) -> dict[str, float]:
        """One step: what `main` prints."""
        count, device = self.stepper.config.batch_size, self.policy.device
        start = index * count % (len(self._prompts) - count + 1)
        prompts = self._prompts.rows(start, start + count)
        draws = Draws.of(self._generation, count, seed=0, step=index)
        evaluate = Timed(type(self.stepper).evaluate.__get__(self.stepper), device)
        self.stepper.evaluate = evaluate  # type: ignore[method-assign]
        processor_began, began = self._processor_s(), now(device)
        with measuring_peak(device) as rollout_peak:
            collected = collect_rollout(
                self.stepper,
                self._tokenizer,
                prompts,
                draws,
                self._generation,
                self._client,
                sample=self._sample,
            )
        at_update = now(device)
        with measuring_peak(device) as update_peak:
            result = self.stepper.update(collected.rollout)
        ended = now(device)
        samples = collected.rollout.samples
        return {
            "generate": at_update - began - evaluate.seconds - collected.waited_s,
            "reward": collected.waited_s,
            "evaluate": evaluate.seconds,
            "update": ended - at_update,
            "step": ended - began,
            "processor": self._processor_s() - processor_began,
            "samples": count,
            "tokens": int(samples.mask.sum()),
            "peak_mib": max(self._loading_peak_mib, rollout_peak.mib, update_peak.mib),
            "service_peak_mib": peak_resident_mib(self._service.pid),
            "rollout_peak_mib": rollout_peak.mib,
            "update_peak_mib": update_peak.mib,
            "ratio_drift": result.statistics["ppo/policy/ratio_drift"],
            **{f"{phase}_operations": count for phase, count in self._operations(samples).items()},
        }

    def _processor_s(self) -> float:
        service = self._service.cpu_times()
        return time.process_time() + float(service.user + service.system)

    def _operations(self, samples: Samples) -> dict[str, float]:
        """The least floating-point operations of each phase of a step, without those of a value model."""
        model = self.policy.language_model
        embeddings = {
            id(p) for p in (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters())
        }
        trunk = sum(
            p.numel() for n, p in model.named_parameters() if p.ndim == 2 and id(p) not in embeddings and "wpe" not in n
        )
        head = model.get_output_embeddings().weight.numel()
        responses = int(samples.mask.sum())
        tokens = int(samples.query_mask.sum()) + responses - len(samples)
        forward = 2 * (trunk * tokens + head * responses)
        backward = 1 if self.policy.has_adapters else 2
        return {
            "generate": forward,
            "evaluate": 2 * forward,
            "update": (1 + backward) * forward * self.stepper.config.ppo_epochs,
        }


@contextlib.contextmanager
def judged(model: str, label: str | None) -> Iterator[tuple[RewardClient, psutil.Process]]:
    """A reward service with this model, and its process."""
    with (
        tempfile.TemporaryDirectory() as directory,
        reward_service(model, Path(directory), ready_timeout_s=300.0) as url,
        RewardClient(RewardSettings.of(url=(url,), label=label)) as client,
    ):
        client.connect()
        (service,) = psutil.Process().children()
        yield client, service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a causal LM")
    parser.add_argument("--reward-model", required=True, help="directory of a sequence classifier")
    parser.add_argument("--label", help="of the classifier; not needed if it has only one")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of token lists")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=128, help="prompts generated at once")
    parser.add_argument("--lora-r", type=int, default=0, help="0 trains every parameter")
    parser.add_argument("--response-length", type=int, default=0, help="of all responses; 0 draws 4 to 16 for each")
    parser.add_argument("--value-model", default="shared", help="as the setting model.value_model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    token_ids = json.loads(arguments.prompts.read_text())
    prompts = Prompts(token_ids, prompt_texts(load_tokenizer(arguments.policy), token_ids))
    with judged(arguments.reward_model, arguments.label) as (client, service):
        steps = Steps(arguments, prompts, client, service)
        for index in range(arguments.steps):
            print(json.dumps(steps.step(index)), flush=True)


if __name__ == "__main__":
    main()
