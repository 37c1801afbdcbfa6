"""Peak memory of a PPO step with a large vocabulary: whole logits against logits in pieces, by phase and by format.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo.vocabulary phases --results DIR --table docs/evidence/memory.md
    OMP_NUM_THREADS=1 python -m benchmarks.ppo.vocabulary slope --results DIR --table docs/evidence/memory.md

`phases`: loading, rollout and update of a Qwen2 of 0.5B parameters (24 layers, 896 wide, 151,936 tokens) with random
weights and LoRA, for each format of its base. `slope`: a model of two layers with two vocabularies and two lengths of
16 responses; what is left of the four peaks when a part for each vocabulary and one for each length is taken off is
the memory for each logit. Each measurement is one step in a process of its own; results are kept in DIR, and a call
that finds them doesn't measure again. Peaks are resident sizes beyond that of a process that has loaded no model; for
the slope, beyond the process with its model.
"""

import argparse
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.ppo.memory import give_freed_memory_back
from benchmarks.tables import measured_on, put
from harness.tiny_models import tiny_tokenizer
from plaudit.learner.memory import measuring_peak
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.generation import Draws, generate
from plaudit.policy.loading import load_policy
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters

WHOLE = 1e9
"""MiB of logits that no pass reaches."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Model:
    """The size of a Qwen2."""

    vocabulary: int
    layers: int = 24
    width: int = 896
    heads: int = 14

    def saved_under(self, directory: Path) -> Path:
        """Its directory, which is made if it isn't there: random weights in bf16."""
        path = directory / f"qwen2-{self.vocabulary}-{self.layers}-{self.width}"
        if not (path / "config.json").is_file():
            torch.manual_seed(0)
            torch.set_default_dtype(torch.bfloat16)
            config = Qwen2Config(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.width * 4864 // 896,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                dtype="bfloat16",
            )
            Qwen2ForCausalLM(config).save_pretrained(path)
            torch.set_default_dtype(torch.float32)
        return path


@dataclass(frozen=True)
class Case:
    """One step to measure."""

    name: str
    settings: ModelSettings
    model: Model = field(default_factory=lambda: Model(151_936))
    samples: int = 8
    tokens: int = 16


PIECES = 64
"""MiB of logits above which passes go in pieces here, where a step is small."""
PHASES = (
    Case("fp32, whole logits", ModelSettings(logits_mib=WHOLE)),
    Case("fp32", ModelSettings(logits_mib=PIECES)),
    Case("bf16", ModelSettings(dtype="bf16", logits_mib=PIECES)),
    Case("QLoRA (4 bits), whole logits", ModelSettings(quantization="4bit", logits_mib=WHOLE)),
    Case("QLoRA (4 bits)", ModelSettings(quantization="4bit", logits_mib=PIECES)),
    Case("8 bits, whole logits", ModelSettings(quantization="8bit", logits_mib=WHOLE)),
    Case("8 bits", ModelSettings(quantization="8bit", logits_mib=PIECES)),
    Case("QLoRA (4 bits), the rest bf16", ModelSettings(quantization="4bit", dtype="bf16", logits_mib=PIECES)),
)
NARROW = (Model(32_000, 2, 256, 4), Model(151_936, 2, 256, 4))
SLOPES = tuple(
    Case(f"{words}, V = {model.vocabulary:,}, N = {16 * tokens:,}", ModelSettings(logits_mib=limit), model, 16, tokens)
    for words, limit in (("whole", WHOLE), ("in pieces", PIECES / 2))
    for model in NARROW
    for tokens in (32, 128)
)


@dataclass(frozen=True)
class Peaks:
    """MiB."""

    weights: float
    load: float
    rollout: float
    update: float
    with_model: float
    """What the process has before its first step."""


def measure(case: Case, directory: Path) -> Peaks:
    """One step in this process."""
    cpu = torch.device("cpu")
    path = case.model.saved_under(directory)
    give_freed_memory_back()
    with measuring_peak(cpu) as before:
        pass
    with measuring_peak(cpu) as load:
        policy = load_policy(path, LoraSettings(r=16, alpha=32), case.settings)
    give_freed_memory_back()
    with measuring_peak(cpu) as with_model:
        pass
    config = PPOHyperparameters(batch_size=case.samples, mini_batch_size=case.samples, ppo_epochs=1)
    stepper = PPOStepper(policy, None, config)
    generation = GenerationSettings(min_new_tokens=case.tokens, max_new_tokens=case.tokens)
    draws = Draws.of(generation, case.samples, seed=0, step=0)
    queries = [[5 + i, 7, 11, 13] for i in range(case.samples)]
    with measuring_peak(cpu) as rollout:
        with policy.generating():
            samples = generate(policy.language_model, queries, draws, generation, tiny_tokenizer())
        evaluated = stepper.evaluate(samples)
    give_freed_memory_back()
    scores = torch.linspace(-1.0, 1.0, case.samples)
    with measuring_peak(cpu) as update:
        stepper.update(evaluated.with_scores(scores))
    weights = sum(p.numel() * p.element_size() for p in policy.parameters()) / 2**20
    return Peaks(weights, *(peak.mib - before.mib for peak in (load, rollout, update, with_model)))


def results_of(cases: Sequence[Case], results: Path) -> dict[str, Peaks]:
    """The peaks of each case, measured one after another unless the results hold them."""
    results.mkdir(parents=True, exist_ok=True)
    for case in cases:
        case.model.saved_under(results)
    peaks = {}
    for case in cases:
        file = results / f"{case.name.replace(' ', '_').replace(',', '')}.json"
        if not file.is_file():
            # A process each: memory that a process has had once, it may keep.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                file.write_text(json.dumps(asdict(pool.apply(measure, (case, results)))))
        peaks[case.name] = Peaks(**json.loads(file.read_text()))
        print(case.name, peaks[case.name], flush=True)
    return peaks


def table_of_phases(peaks: Mapping[str, Peaks]) -> list[str]:
    """Markdown."""
    lines = ["| base, MiB | weights | loading | rollout | update |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, p in peaks.items():
        lines.append(f"| {name} | {p.weights:.0f} | {p.load:.0f} | {p.rollout:.0f} | {p.update:.0f} |")
    return lines


def table_of_slopes(peaks: Mapping[str, Peaks]) -> list[str]:
    """Markdown: MiB beyond the model, and bytes for each logit."""
    lines = ["| logits | phase | V = 32,000, N = 512 | N = 2,048 | V = 151,936, N = 512 | N = 2,048 | bytes a logit |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    logits = (NARROW[1].vocabulary - NARROW[0].vocabulary) * (2048 - 512)
    for words in ("whole", "in pieces"):
        four = [p for name, p in peaks.items() if name.startswith(f"{words}, ")]
        for phase in ("rollout", "update"):
            mib = [getattr(p, phase) - p.with_model for p in four]
            slope = (mib[3] - mib[2] - mib[1] + mib[0]) * 2**20 / logits
            lines.append(f"| {words} | {phase} | {' | '.join(f'{m:.0f}' for m in mib)} | {slope:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["phases", "slope"])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="a document with the table to replace")
    arguments = parser.parse_args()
    cases, table = (PHASES, table_of_phases) if arguments.what == "phases" else (SLOPES, table_of_slopes)
    lines = table(results_of(cases, arguments.results))
    print("\n".join(lines))
    if arguments.table is not None:
        put(arguments.table, arguments.what, [f"Measured {measured_on(*PACKAGES)}.", "", *lines])


if __name__ == "__main__":
    main()
