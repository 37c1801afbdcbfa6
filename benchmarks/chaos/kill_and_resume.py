"""Kill `plaudit ppo` without warning at random moments, resume it each time, and compare with a run left in peace.

    OMP_NUM_THREADS=1 python -m benchmarks.chaos.kill_and_resume --kills 20

SIGKILL takes a real process: while it loads, rolls out, updates, or writes a checkpoint. It is forked from one that has
imported everything, so that the moments fall into the run and not into imports. Weights and metrics must be equal to
the bit; exits 1 if they are not.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from harness.runs import TrainerProcess, largest_difference
from harness.stub_reward_server import StubRewardServer
from harness.tiny_models import tiny_gpt2_dir
from plaudit.rewards.settings import RewardSettings
from plaudit.run.checkpoint import list_checkpoints
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages.ppo_setup import CHECKPOINTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the load of the machine moves them too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    server = StubRewardServer()
    try:
        with tempfile.TemporaryDirectory() as directory:
            return compare(Path(directory), server.url, arguments.kills, arguments.steps, random.Random(arguments.seed))
    finally:
        server.kill()


def compare(directory: Path, url: str, kills: int, steps: int, moments: random.Random) -> int:
    """Runs until so many have been killed, each run to its end, and prints what came of it."""
    config = configuration(directory, url, steps)
    undisturbed = replace(config, output_dir=directory / "undisturbed")
    TrainerProcess(replace(undisturbed, output_dir=directory / "warm-up", steps=1)).end()
    began = time.perf_counter()
    finish(undisturbed)
    whole_s = time.perf_counter() - began
    print(f"undisturbed: {steps} steps in {whole_s:.1f} s, start and end included")

    where: Counter[str] = Counter()
    different = runs = 0
    while where.total() < kills:
        run = replace(config, output_dir=directory / f"run-{runs}")
        while where.total() < kills and kill(run, moments.uniform(0, whole_s / 2), where):
            pass
        finish(run)
        of_metrics, of_weights = largest_difference(run.output_dir, undisturbed.output_dir)
        different += of_metrics != 0 or of_weights != 0
        runs += 1
        print(f"run {runs}: difference of metrics {of_metrics}, of weights {of_weights}")
    places = ", ".join(f"{count} {place}" for place, count in where.most_common())
    print(f"{where.total()} kills ({places}) in {runs} runs: {runs - different} of {runs} equal to the bit")
    return int(different > 0)


def kill(config: PPOConfig, after_s: float, where: Counter[str]) -> bool:
    """Starts or resumes the run and kills it after so long. False if it ended first."""
    saved, litter = steps_saved(config), half_written(config)
    process = TrainerProcess(config, "--resume", "auto")
    process.process.join(after_s)
    if process.process.exitcode is not None:
        code, stderr = process.end()
        assert code == 0, stderr
        return False
    process.process.kill()
    process.end()
    if half_written(config) - litter:
        where["while writing a checkpoint"] += 1
    else:
        where["before a step was saved" if steps_saved(config) == saved else "between later steps"] += 1
    return True


def finish(config: PPOConfig) -> None:
    code, stderr = TrainerProcess(config, "--resume", "auto").end(timeout_s=600)
    assert code == 0, stderr


def half_written(config: PPOConfig) -> set[Path]:
    return set((config.output_dir / CHECKPOINTS).glob(".*.writing"))


def steps_saved(config: PPOConfig) -> int:
    saved = list_checkpoints(config.output_dir / CHECKPOINTS)
    return saved[-1].step if saved else 0


def configuration(directory: Path, url: str, steps: int) -> PPOConfig:
    """A tiny policy, three hundred texts, and a checkpoint every step."""
    texts = directory / "texts.csv"
    texts.write_text("text\n" + "".join(f"Film {i} is " + "a story about a family " * 12 + "\n" for i in range(300)))
    return PPOConfig(
        policy=str(tiny_gpt2_dir(directory / "policy")),
        output_dir=directory / "run",
        dataset=DataSettings(str(texts)),
        reward=RewardSettings.of(url=(url,)),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=2),
        steps=steps,
        checkpoint_every=1,
        device="cpu",
    )


if __name__ == "__main__":
    sys.exit(main())
