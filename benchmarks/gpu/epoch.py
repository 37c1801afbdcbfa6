"""Part 2. One IMDB epoch as published, by the stage that users run, with rewards over HTTP from the same card.

First the whole epoch; then a few steps of each number format and with each fast path off in turn; then the epoch again
with the fastest of them, if it was another. Times are the run's own metrics; `training_s` is what the training loop
took, checkpoints and metrics included, and `start_s` everything before its first step.
"""

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import Results, Setting, attempt, rounded, use_format

EPOCHS, BATCH = 4, 128
FEW_CELLS = 2048
TINY_EPOCH = 8
"""Steps of 8 of the 64 prompts that there are with `--tiny`."""
"""The trainer's own bound for packing."""
PEAK_TFLOPS = {"fp32": 67.0, "TF32": 494.7, "bf16": 989.4}
"""Of an H100 SXM, dense, by its data sheet."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a run differs from the default."""

    name: str
    number_format: str
    static: bool | None = None
    packed: bool = True
    stub: bool = False
    """Rewards from a function in the same process: no HTTP, no wait."""
    graphs: bool = True
    """Updates and evaluations recorded as CUDA graphs."""


DEFAULT = Variant("TF32", "TF32")
VARIANTS = (
    Variant("bf16", "bf16"),
    Variant("TF32, rewards from a function", "TF32", stub=True),
    Variant("TF32, updates not recorded", "TF32", graphs=False),
    Variant("TF32, no packing", "TF32", packed=False),
    Variant("TF32, no static cache", "TF32", static=False),
    Variant("fp32 without TF32", "fp32"),
    Variant("bf16, rewards from a function", "bf16", stub=True),
)


def measure(setting: Setting, results: Results) -> None:
    setting.models_ready()
    with judged(setting, results) as url:

        def epoch(variant: Variant) -> bool:
            work = functools.partial(run, setting, variant, url, None)
            return attempt(setting, results, "epoch", {"variant": variant.name}, work, limit_s=90.0)

        began = setting.left_s
        epoch(DEFAULT)
        epoch_s = began - setting.left_s
        taken = {DEFAULT: results.sections["epoch"][-1].get("step_ms", math.inf)}
        for variant in VARIANTS if not setting.tiny else VARIANTS[1::3]:
            if setting.left_s < epoch_s:
                results.leave_out("variants", variant=variant.name)
                continue
            work = functools.partial(run, setting, variant, url, 2 if setting.tiny else 20)
            if (
                attempt(setting, results, "variants", {"variant": variant.name}, work, limit_s=45.0)
                and not variant.stub
            ):
                taken[variant] = results.sections["variants"][-1]["step_ms"]
        best = min(taken, key=lambda v: taken[v])
        if best != DEFAULT and setting.left_s > epoch_s * taken[best] / taken[DEFAULT]:
            epoch(best)


@contextlib.contextmanager
def judged(setting: Setting, results: Results, dtype: str = "fp32") -> Iterator[str]:
    """The reward service on the same device, in a process of its own; its URL."""
    from plaudit.run.service_process import reward_service

    began = time.perf_counter()
    # The judge's products in TF32 too, as torch's own variable has it; read once, when the service starts.
    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
    with reward_service(
        str(setting.judge),
        setting.work / "service",
        ready_timeout_s=60.0,
        device=setting.device,
        flags=("--batch-tokens", "16384", "--dtype", dtype),
    ) as url:
        name = "tiny" if setting.tiny else "DistilBERT-base"
        del os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"]
        results.add(
            "service", model=name, dtype=f"{dtype}, products in TF32", start_s=rounded(time.perf_counter() - began)
        )
        yield url


def run(setting: Setting, variant: Variant, url: str, steps: int | None) -> dict[str, Any]:
    """A run of the PPO stage; what its metrics say, and what it took."""
    from plaudit.policy import packing
    from plaudit.run.metrics import read_metrics
    from plaudit.stages import ppo

    bf16 = use_format(variant.number_format)
    packing.FEW_CELLS = FEW_CELLS if variant.packed else 10**9
    name = "".join(c if c.isalnum() else "-" for c in variant.name)
    output = setting.work / "runs" / f"{name}-{steps or 'epoch'}"
    config = recipe(setting, variant, url, output, bf16)
    began = time.perf_counter()
    timing = _timing_the_loop(ppo)
    # With no number of steps, a run of few prompts would pass over them more than once.
    ppo.run(dataclasses.replace(config, steps=TINY_EPOCH if steps is None and setting.tiny else steps))
    ended = time.perf_counter()
    metrics = read_metrics(output / "metrics.jsonl")
    training = timing.get("training_s", sum(m["time/step_s"] for m in metrics))
    return {
        "steps": len(metrics),
        "training_s": rounded(training),
        "start_s": rounded(timing.get("began", began) - began, 3),
        "end_s": rounded(ended - timing.get("ended", ended), 3),
        **of_steps(setting, variant, metrics, training),
    }


def _timing_the_loop(ppo: Any) -> dict[str, float]:
    """When the training loop begins and ends, once the stage has run."""
    times: dict[str, float] = {}
    train = ppo.train

    def timed(*arguments: Any, **options: Any) -> Any:
        times["began"] = time.perf_counter()
        try:
            return train(*arguments, **options)
        finally:
            times["ended"] = time.perf_counter()
            times["training_s"] = times["ended"] - times["began"]

    ppo.train = timed
    return times


def of_steps(setting: Setting, variant: Variant, metrics: list[dict[str, float]], training_s: float) -> dict[str, Any]:
    """Medians over steps but the first, which records graphs; and the share of the card's peak."""
    counted = metrics[1:] or metrics

    def median(name: str) -> float:
        return statistics.median(record[name] for record in counted)

    step_s = median("time/step_s")
    needed = operations(setting, metrics)
    row: dict[str, Any] = {
        "step_ms": rounded(1e3 * step_s),
        "rollout_ms": rounded(1e3 * (median("time/rollout_s") - median("time/reward_wait_s"))),
        "reward_wait_ms": rounded(1e3 * median("time/reward_wait_s")),
        "update_ms": rounded(1e3 * median("time/update_s")),
        "first_step_s": rounded(metrics[0]["time/step_s"], 3),
        "samples_per_s": rounded(
            len(counted) * (8 if setting.tiny else BATCH) / sum(m["time/step_s"] for m in counted)
        ),
        "TFLOP a step": rounded(needed / 1e12, 3),
        "TFLOP/s": rounded(needed / step_s / 1e12, 3),
        "peak_mib": round(max(m["memory/update_peak_mib"] for m in metrics)),
        "first ratio is 1 within": rounded(max(m["ppo/policy/ratio_drift"] for m in metrics), 3),
        "last KL": rounded(metrics[-1]["objective/kl"], 3),
        "last reward": rounded(metrics[-1]["env/reward_mean"], 3),
    }
    if setting.on_gpu:
        row["share of the card's peak"] = f"{needed / step_s / 1e12 / PEAK_TFLOPS[variant.number_format]:.1%}"
        row["of training"] = f"{needed * len(metrics) / training_s / 1e12 / PEAK_TFLOPS[variant.number_format]:.1%}"
    return row


def operations(setting: Setting, metrics: list[dict[str, float]]) -> float:
    """The least floating-point operations of a step: 2 for each weight and token of a forward pass.

    A token passes forward once to be generated, once each for policy and reference in the evaluation, and in each epoch
    forward and, for the adapters' sake, back through the activations. The head is needed for response tokens alone.
    """
    trunk, head = (2 * 12 * 32**2, 32 * 300) if setting.tiny else (12 * 12 * 768**2, 768 * 50_257)
    query = statistics.fmean(m["tokens/queries_len_mean"] for m in metrics)
    response = statistics.fmean(m["tokens/responses_len_mean"] for m in metrics)
    batch = 8 if setting.tiny else BATCH
    forward = 2 * batch * (trunk * (query + response - 1) + head * response)
    return forward * (1 + 2 + 2 * EPOCHS)


def recipe(setting: Setting, variant: Variant, url: str, output: Path, bf16: bool) -> Any:
    """`presets/gpt2-imdb.yaml` on the models and prompts that are here."""
    from plaudit.rewards.settings import RewardSettings
    from plaudit.settings.data import DataSettings, PromptSettings
    from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
    from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

    batch = 8 if setting.tiny else BATCH
    # One request a step: the judge takes it as one batch.
    reward = RewardSettings.of(url=(url,), label="POSITIVE", patience_s=20.0, chunk_size=BATCH)
    if variant.stub:
        reward = RewardSettings.of(function="benchmarks.gpu.common:lengths")
    return PPOConfig(
        policy=str(setting.policy),
        output_dir=output,
        # Openings of the texts that are long enough: the source is cut already.
        dataset=DataSettings(str(setting.prompts), held_out_fraction=1e-9),
        prompts=PromptSettings(min_text_chars=1),
        generation=GenerationSettings(batch_size=batch, static_cache=variant.static),
        reward=reward,
        lora=LoraSettings(r=16, alpha=32, target_modules=("c_attn",)),
        model=ModelSettings(bf16=bf16, tf32=variant.number_format == "TF32", cuda_graphs=variant.graphs),
        ppo=PPOHyperparameters(batch_size=batch, mini_batch_size=batch, ppo_epochs=EPOCHS, learning_rate=1.41e-5),
        trackers=("tensorboard",),
        device=setting.device,
    )
