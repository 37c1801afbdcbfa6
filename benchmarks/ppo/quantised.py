"""Bases in 8 and 4 bits through stage 3, beside fp32 and bf16: what they learn, their memory and their time.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo.quantised [--steps 10] [--table docs/evidence/models.md]

Each format is the PPO stage of the demo's preset on the embedded models (the policy's weights in fp32), `plaudit ppo`
in all but its process, against one reward service on this machine. "Largest log-ratio" is that of the very first
mini-batch of any step: rollout and update compute the same where it is 0 but for rounding. "Merged" is how far the
merged model's log-probabilities are from those of the full-precision base with the trained adapters.

Weights, peaks and the update's time are those of one step of a GPT-2 of 124M parameters as `benchmarks.ppo.memory`
takes it: MiB, and CPU time as a multiple of fp32's. Every format runs in a process of its own.
"""

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.ppo.memory import Layout, Measured, measure
from benchmarks.ppo.models import models_of
from benchmarks.tables import measured_on, put
from plaudit.policy.pretrained import load_causal_lm, load_tokenizer
from plaudit.run.metrics import FILE_NAME, KL, REWARD_MEAN, read_metrics
from plaudit.run.service_process import reward_service
from plaudit.settings import files as presets
from plaudit.settings.policy import ModelSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo

TABLE = "quantised bases"
FORMATS = {
    "fp32": ModelSettings(),
    "bf16 (`--model.bf16`)": ModelSettings(bf16=True),
    "8 bits (`--model.quantization 8bit`)": ModelSettings(quantization="8bit"),
    "4 bits (`--model.quantization 4bit`)": ModelSettings(quantization="4bit"),
}
HEADER = (
    "| base | reward, first step | last 3 steps | KL, last 3 steps | largest log-ratio | merged | weights, MiB "
    "| peak in the rollout | in the update | update time |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
LAST_STEPS = 3


@dataclass(frozen=True)
class Learnt:
    """One format's run."""

    first_reward: float
    last_reward: float
    last_kl: float
    log_ratio: float
    merged: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--preset", type=Path, default=Path("presets/demo.yaml"))
    parser.add_argument("--reward-model", default="models/imdb-distilbert-mini")
    parser.add_argument("--table", type=Path, metavar="DOCUMENT", help="write the table into this document")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    lines = [f"Measured {measured_on(*packages)}; {arguments.steps} steps.", "", *HEADER]
    print(*lines, sep="\n", flush=True)
    with (
        tempfile.TemporaryDirectory() as directory,
        reward_service(arguments.reward_model, Path(directory), ready_timeout_s=300.0) as url,
    ):
        preset = presets.load(PPOConfig, arguments.preset)
        policy, large = in_fp32(preset.policy, Path(directory) / "small"), models_of("124m", Path(directory)).policy
        fp32_s = math.nan
        for number, (words, settings) in enumerate(FORMATS.items()):
            config = dataclasses.replace(
                preset,
                policy=str(policy),
                steps=arguments.steps,
                model=settings,
                reward=preset.reward.asking(url),
                output_dir=Path(directory) / str(number),
                merge=True,
            )
            run: Learnt = in_a_process(learn, config)
            layout = Layout(words, model=settings)
            step: Measured = in_a_process(measure, layout, large, 32, "cpu", 0, "")
            fp32_s = step.update_cpu_s if number == 0 else fp32_s
            lines.append(
                f"| {words} | {run.first_reward:+.2f} | {run.last_reward:+.2f} | {run.last_kl:.2f} "
                f"| {run.log_ratio:.0e} | {run.merged:.0e} | {step.weights:.0f} | {step.rollout:.0f} "
                f"| {step.update:.0f} | {step.update_cpu_s / fp32_s:.2f} |"
            )
            print(lines[-1], flush=True)
    if arguments.table:
        put(arguments.table, TABLE, lines)


def in_fp32(policy: str, path: Path) -> Path:
    """A copy of the policy whose files are in fp32, so that merging into it rounds nothing."""
    load_causal_lm(policy).save_pretrained(path)
    load_tokenizer(policy).save_pretrained(path)
    return path


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns in a fresh process: memory that a process has had once, it may keep."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def learn(config: PPOConfig) -> Learnt:
    """A whole run, in this process."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with Path(os.devnull).open("w") as no, contextlib.redirect_stdout(no), contextlib.redirect_stderr(no):
        ppo.run(config)
    steps = read_metrics(config.output_dir / FILE_NAME)
    last = steps[-LAST_STEPS:]
    return Learnt(
        first_reward=steps[0][REWARD_MEAN],
        last_reward=statistics.fmean(step[REWARD_MEAN] for step in last),
        last_kl=statistics.fmean(step[KL] for step in last),
        log_ratio=max(math.log1p(step["ppo/policy/ratio_drift"]) for step in steps),
        merged=merged_from_adapted(config),
    )


@torch.no_grad()
def merged_from_adapted(config: PPOConfig) -> float:
    """The largest difference in log-probabilities, over some text, of the merged model and the base with adapters."""
    merged = load_causal_lm(config.output_dir / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(load_causal_lm(config.policy), config.output_dir).eval()
    ids = torch.arange(10, 42)[None]
    ours, theirs = (model(input_ids=ids).logits.log_softmax(-1) for model in (merged, adapted))
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    main()
