"""The dry run `plaudit ppo --check`: it reports a prompt, rewards, time, memory and disk space.

Failure modes: an estimate that is not based on a real step; a trial that leaves files behind. The step is taken in
memory, and its files go to a temporary directory next to the run's, which is deleted.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from plaudit.errors import ConfigError
from plaudit.learner.rollout import CollectedRollout
from plaudit.parallel.launch import world_size
from plaudit.policy.texts import decode, named_tokens
from plaudit.rewards import RewardRejected
from plaudit.run import checkpoint as checkpoints
from plaudit.run.storage import NotWritten, writing
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.watch import WatchSettings
from plaudit.stages.ppo_setup import Training, hold_directory, set_up

MIB = 2**20


@contextmanager
def tried_out(config: PPOConfig) -> Iterator[Training]:
    """The run of `config`, set up with a temporary directory inside the block.

    Raises:
        ConfigError: as `set_up` does; or the run's own directory is in use, or contains another run.
    """
    if world_size() > 1:
        raise ConfigError(f"--check runs in one process, and a launcher started {world_size()}: start it without one")
    there = config.output_dir.exists()
    try:
        with ExitStack() as held:
            resumed = hold_directory(config, held)
            with writing(config.output_dir):
                scratch = held.enter_context(tempfile.TemporaryDirectory(prefix=".check-", dir=config.output_dir))
            yield held.enter_context(
                set_up(
                    replace(
                        config,
                        check=False,
                        output_dir=Path(scratch),
                        resume=None if resumed is None else str(resumed.directory),
                        trackers=(),
                        log_samples_every=0,
                        watch=WatchSettings(),
                    )
                )
            )
    except RewardRejected as error:
        # The written files were deleted with the temporary directory.
        vars(error).pop("__notes__", None)
        error.leave_in(config.output_dir)
        raise
    finally:
        if not there and {path.name for path in config.output_dir.glob("*")} <= {".lock"}:
            shutil.rmtree(config.output_dir, ignore_errors=True)


def tell_prompt(training: Training) -> None:
    """Print the first prompt of the next step, as text and as tokens."""
    prompts = training.rollouts.schedule.batch(training.stepper.steps_done).rows(0, 1)
    tokenizer, ids = training.rollouts.tokenizer, prompts.token_ids[0]
    print(f"a prompt, {len(ids)} tokens: {decode(tokenizer, [ids])[0]!r}")
    print(f"  its tokens: {named_tokens(tokenizer, ids)}")
    for name, values in prompts.fields.items():
        print(f"  its field {name}: {values[0]!r}")


def tell_rewards(collected: CollectedRollout) -> None:
    """Print a batch's rewards, and the first response with its reward."""
    scores = collected.rollout.scores.tolist()
    print(f"a response: {collected.responses[0]!r}, reward {scores[0]:.3f}")
    print(
        f"rewards of {len(scores)} responses: mean {statistics.fmean(scores):.3f}, from {min(scores):.3f} to "
        f"{max(scores):.3f}; {statistics.fmean(collected.ended):.0%} of the responses ended by themselves"
    )
    if len(set(scores)) == 1:
        print("all rewards are equal: from such a batch nothing can be learned")


def tell_estimates(config: PPOConfig, training: Training, metrics: Mapping[str, float], *, steps: int) -> None:
    """Print the whole run's estimated time, memory and disk space, based on one step and one checkpoint.

    Raises:
        NotWritten: the disk has too little free space.
    """
    step_s = metrics["time/step_s"]
    print(
        f"time: {step_s:.1f} s a step ({metrics['time/rollout_s']:.1f} s of it for the rollout), so about "
        f"{_duration(steps * step_s)} for {steps} steps"
    )
    device = training.stepper.policy.device
    peak = max(metrics["memory/rollout_peak_mib"], metrics["memory/update_peak_mib"])
    print(f"memory: {peak:,.0f} MiB at its peak, of {_memory_mib(device):,.0f} MiB ({device.type})")
    saved = training.save_checkpoint().directory
    checkpoint = sum(file.stat().st_size for file in saved.rglob("*")) / MIB
    results = (saved / checkpoints.WEIGHTS).stat().st_size / MIB
    if config.merge:
        model = training.stepper.policy.language_model
        results += sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    # While a checkpoint is written, the ones that it replaces still exist.
    needed = (config.keep_checkpoints + 1) * checkpoint + results
    free = shutil.disk_usage(config.output_dir).free / MIB
    print(f"disk: {checkpoint:,.1f} MiB a checkpoint, {needed:,.1f} MiB in all; {free:,.0f} MiB are free")
    if needed > free:
        raise NotWritten(f"output_dir={config.output_dir} needs {needed:,.0f} MiB and has {free:,.0f} MiB: make room")
    print("OK: nothing was trained; leave out --check to begin")


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / MIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
