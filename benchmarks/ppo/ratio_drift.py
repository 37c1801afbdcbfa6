"""How far from 1 a ratio is before the first update of a step, for each format of the base weights.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo.ratio_drift [--table docs/evidence/memory.md]

The rollout is evaluated with all samples together, the update computes a mini-batch of them in another order: both
round, but not alike.
The embedded GPT-2 with LoRA takes two steps of 32 responses of 4 to 24 tokens, with padded rows, with packed rows, with
both as in a real run, and then with response tokens that go through the output head in pieces. The figure is the
largest |ratio - 1| of any token in the first mini-batch of any step. Takes 3 minutes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks.tables import measured_on, put
from plaudit.demo_models import resolve
from plaudit.learner.stepper import PPOStepper
from plaudit.policy import packing
from plaudit.policy.generation import Draws, generate
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters

FORMATS = {
    "fp32": ModelSettings(),
    "fp16 (`model.dtype=fp16`)": ModelSettings(dtype="fp16"),
    "bf16 (`model.dtype=bf16`)": ModelSettings(dtype="bf16"),
    "fp32, passes in bf16 (`model.bf16`)": ModelSettings(bf16=True),
    "8 bits (`model.quantization=8bit`)": ModelSettings(quantization="8bit"),
    "4 bits (`model.quantization=4bit`)": ModelSettings(quantization="4bit"),
    "4 bits, the rest bf16": ModelSettings(quantization="4bit", dtype="bf16"),
}
SAMPLES, STEPS, WHOLE_MIB, PIECES_MIB = 32, 2, 512.0, 0.5
BETWEEN = 500
"""Cells that a rollout of 32 samples has and a mini-batch of 8 has not: large batches are packed, small ones padded."""


def drift(settings: ModelSettings, *, few_cells: int) -> float:
    """The largest |ratio - 1| of the first mini-batches."""
    path = resolve("imdb-gpt2-mini")
    tokenizer = load_tokenizer(path)
    torch.manual_seed(0)
    policy = load_policy(path, LoraSettings(r=16, alpha=32), settings)
    generation = GenerationSettings(min_new_tokens=4, max_new_tokens=24)
    config = PPOHyperparameters(batch_size=SAMPLES, mini_batch_size=8, ppo_epochs=1, learning_rate=1e-3)
    stepper = PPOStepper(policy, None, config, generation=generation)
    # By default, the rollout is evaluated in groups of a mini-batch's size, and here nothing would differ.
    stepper.batch_size_finder.size = SAMPLES
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    with mock.patch.object(packing, "FEW_CELLS", few_cells):
        for step in range(STEPS):
            queries = torch.randint(100, 4000, (SAMPLES, 6), generator=generator).tolist()
            draws = Draws.of(generation, SAMPLES, seed=0, step=step)
            with policy.generating():
                samples = generate(policy.language_model, queries, draws, generation, tokenizer)
            scores = torch.rand(SAMPLES, generator=generator)
            result = stepper.update(stepper.evaluate(samples).with_scores(scores))
            largest = max(largest, result.statistics["ppo/policy/ratio_drift"])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="DOCUMENT", help="write the table into this document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"Measured {measured_on('torch', 'transformers', 'peft', 'bitsandbytes')}.",
        "",
        "| base | padded rows | packed rows | rollout packed, update padded | the same, logits in pieces |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    print(*lines, sep="\n", flush=True)
    for words, settings in FORMATS.items():
        ways = ((WHOLE_MIB, 10**9), (WHOLE_MIB, 0), (WHOLE_MIB, BETWEEN), (PIECES_MIB, BETWEEN))
        found = [drift(replace(settings, logits_mib=mib), few_cells=few) for mib, few in ways]
        lines.append(f"| {words} | {' | '.join(f'{ratio:.0e}' for ratio in found)} |")
        print(lines[-1], flush=True)
    if arguments.table is not None:
        put(arguments.table, "ratio drift", lines)


if __name__ == "__main__":
    main()
