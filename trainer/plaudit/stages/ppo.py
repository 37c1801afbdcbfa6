"""Stage 3: PPO. A policy, prompts and reward endpoints in; adapters, value head, metrics and a model card out."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plaudit.data.prompts import PromptSchedule, load_prompts
from plaudit.errors import ConfigError
from plaudit.learner.memory import keep_freed_memory, measuring_peak
from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.rollout import Collected, Sampler, collect, sampler
from plaudit.learner.stepper import PPOStepper, Sampling
from plaudit.parallel.processes import Processes, joined, settle_arithmetic
from plaudit.parallel.sharding import shard, sharding_for, whole_weights
from plaudit.policy.checks import check_policy, check_prompts, check_tokenizer_fits, room_for_prompts
from plaudit.policy.generation import Draws
from plaudit.policy.model import Policy, PolicyWeights, load_policy, load_tokenizer
from plaudit.policy.samples import Rollout
from plaudit.ppo.rewards import penalise_length, penalise_missing_eos
from plaudit.report.model_card import write_model_card
from plaudit.rewards import RewardClient, RewardRejected, RewardUnavailable
from plaudit.run import checkpoint as checkpoints
from plaudit.run.metrics import (
    ENDED_SHARE,
    FILE_NAME,
    REWARD_COMPONENT,
    REWARD_MEAN,
    REWARD_STD,
    MetricsLog,
    forget_steps_after,
    open_tracker,
    read_metrics,
)
from plaudit.run.post_mortem import save_non_finite_batch
from plaudit.run.progress import StepProgress, WaitingLine
from plaudit.run.runtime import StopRequested, StopSignal, exclusive
from plaudit.run.storage import NotWritten, files_of, write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PenaltySettings, PPOConfig

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "run.json"
MERGED = "merged"


@dataclass(frozen=True)
class PPOResult:
    """Where the trained policy is, and the last step's metrics."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]


def run(config: PPOConfig) -> PPOResult:
    """Train from the start or from a checkpoint, and write everything to `config.output_dir`."""
    if not config.reward.says_whom_to_ask:
        raise ConfigError(
            "reward.url is missing: start a service with `plaudit-reward --model DIR` and pass --reward.url"
        )
    torch.manual_seed(config.seed)
    keep_freed_memory()
    settle_arithmetic(tf32=config.model.tf32)
    timeout_s = config.reward.patience_s + config.reward.request_timeout_s + config.collective_timeout_s
    with (
        _telling_where_to_go_on(config.output_dir / CHECKPOINTS),
        joined(config.device, timeout_s=timeout_s) as (processes, device),
        contextlib.ExitStack() as held,
        StopSignal().listening() as stop,
    ):
        sharding = sharding_for(config) if processes.count > 1 else None
        processes.on_main(lambda: held.enter_context(exclusive(config.output_dir)))
        resumed = processes.on_main(lambda: _checkpoint_to_resume(config))
        tokenizer = load_tokenizer(config.policy)
        policy = load_policy(config.policy, config.lora, config.model, device=device)
        cached = check_policy(policy, config.policy)
        room = room_for_prompts(policy.language_model, config.generation)
        prompts = load_prompts(config.dataset, config.prompts, tokenizer, "train", seed=config.seed, room=room)
        check_tokenizer_fits(tokenizer, policy.language_model, config.policy, prompts.texts)
        check_prompts(tokenizer, policy.language_model, prompts.token_ids, config.generation, config.policy)
        inputs = {
            "prompts": prompts.fingerprint(),
            "policy": checkpoints.frozen_weights_fingerprint(policy),
        }
        if resumed is not None:
            checkpoints.check_same_inputs(resumed, inputs)
        processes.copy_from_main(parameter for parameter in policy.parameters() if parameter.requires_grad)
        gathered: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if sharding is not None:
            sharded = shard(policy, sharding)
            gathered = sharded.gathered
            if processes.is_main:
                print(sharded)
        schedule = PromptSchedule(prompts, config.ppo.batch_size, seed=config.seed)
        steps = config.steps if config.steps is not None else schedule.steps_per_epoch
        stepper = PPOStepper(
            policy,
            None,
            config.ppo,
            sampling=Sampling(config.generation.temperature, config.generation.top_k, config.generation.top_p),
            total_steps=steps,
            seed=config.seed,
            processes=processes,
            graphs=config.model.cuda_graphs,
        )
        if resumed is not None:
            checkpoints.restore(resumed, policy, stepper)
        progress = StepProgress(steps, stepper.steps_done, held.enter_context(WaitingLine()))
        with RewardClient(config.reward, on_wait=progress.waiting) as client:
            revisions = processes.together(lambda: _connect(client, config, resumed, stop))
            if len(set(revisions)) > 1 and not config.reward.allow_revision_change:
                raise RewardRejected(f"the processes see different reward models: {', '.join(sorted(set(revisions)))}")
            sample = sampler(policy, config.generation, tokenizer, cached=cached)
            log: list[MetricsLog] = []
            processes.on_main(lambda: _prepare_directory(config, stepper.steps_done))
            processes.on_main(lambda: log.append(held.enter_context(_open_log(config, stepper.steps_done))))
            loop = _Loop(
                config,
                tokenizer,
                policy,
                gathered,
                sample,
                stepper,
                schedule,
                client,
                stop,
                processes,
                progress,
                inputs,
            )
            if processes.is_main:
                print(f"{policy.trainable_parameters_line()}\n{policy.reference_line()}", flush=True)
                if not cached:
                    print("sampling without a key-value cache, since this model keeps none: right, and slow")
                with progress.showing():
                    metrics = loop.train(steps, log[0])
            else:
                metrics = loop.train(steps, None)
            weights = None if sharding is None else whole_weights(policy)
            if processes.is_main:
                _write_results(loop, weights)
    return PPOResult(config.output_dir, stepper.steps_done, metrics)


def _prepare_directory(config: PPOConfig, steps_done: int) -> None:
    """The settings of this run, and nothing of steps that it is about to take."""
    directory = config.output_dir
    write_text(directory / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    forget_steps_after(directory / FILE_NAME, steps_done)
    for dropped in checkpoints.forget_checkpoints_after(directory / CHECKPOINTS, steps_done):
        print(f"dropped {dropped}: its steps are taken again")


def _open_log(config: PPOConfig, steps_done: int) -> MetricsLog:
    directory = config.output_dir
    others = [open_tracker(name, directory, to_dict(config)) for name in config.trackers if name != "tensorboard"]
    tensorboard = "tensorboard" in config.trackers
    return MetricsLog(directory, resume_from=steps_done, tensorboard=tensorboard, trackers=others)


def _write_results(loop: "_Loop", weights: PolicyWeights | None) -> None:
    """Everything that a finished run leaves beside its metrics and checkpoints."""
    config, directory = loop.config, loop.config.output_dir
    with files_of(directory) as beside:
        loop.policy.save(beside, weights)
        loop.tokenizer.save_pretrained(beside)
        loop.policy.check_saved(beside, weights)
    write_model_card(config, directory, read_metrics(directory / FILE_NAME), loop.client.revision)
    if config.merge:
        with files_of(directory / MERGED) as beside:
            loop.policy.merge(beside, weights)
            loop.tokenizer.save_pretrained(beside)
    print(f"trained {loop.stepper.steps_done} steps; adapters, value head and metrics are in {directory}")


@contextlib.contextmanager
def _telling_where_to_go_on(root: Path) -> Iterator[None]:
    """Adds to a failed write what is left of the run."""
    try:
        yield
    except NotWritten as error:
        existing = checkpoints.list_checkpoints(root)
        whole = f"the newest whole checkpoint is {existing[-1].directory}" if existing else "there is no checkpoint yet"
        error.add_note(f"{whole}; then go on with --resume auto")
        raise


@dataclass(frozen=True)
class _Loop:
    """What every step needs, set up before the first."""

    config: PPOConfig
    tokenizer: Any
    policy: Policy
    gathered: Callable[[], AbstractContextManager[None]]
    """Around a rollout, which needs all of the policy's weights in one place."""
    sample: Sampler
    stepper: PPOStepper
    schedule: PromptSchedule
    client: RewardClient
    stop: StopSignal
    processes: Processes
    progress: StepProgress
    inputs: Mapping[str, str]
    """Fingerprints of what the run reads, for its checkpoints."""

    def train(self, steps: int, log: MetricsLog | None) -> dict[str, float]:
        """Steps until `steps` are done. Whatever ends the run early leaves a checkpoint of the last whole step."""
        metrics: dict[str, float] = {}
        try:
            while self.stepper.steps_done < steps:
                metrics = self._step(log)
                if self.stepper.steps_done % self.config.checkpoint_every == 0 or self.stepper.steps_done == steps:
                    self._save_checkpoint()
                self.processes.together(self.stop.check)
        except (RewardUnavailable, RewardRejected, StopRequested) as error:
            if isinstance(error, RewardRejected) and self.processes.is_main:
                error.leave_in(self.config.output_dir)
            try:
                saved = self._save_checkpoint()
                error.add_note(f"checkpoint {saved.directory} written, for --resume auto to go on from")
            except NotWritten as unsaved:
                error.add_note(f"no checkpoint of the last step: {unsaved}")
            raise
        return metrics

    def _step(self, log: MetricsLog | None) -> dict[str, float]:
        config, step, began = self.config, self.stepper.steps_done, time.perf_counter()
        # Gathering is work of all processes together: what fails in it can't be told to the others first.
        with measuring_peak(self.policy.device) as rollout_peak, self.gathered():
            parts = self.processes.together(self._collect_share)
            collected = Collected.concatenate(parts).to(self.policy.device)
        collected_at = time.perf_counter()
        rollout = penalised(collected.rollout, config.penalties, collected.ended)
        try:
            with measuring_peak(self.policy.device) as update_peak:
                result = self.stepper.update(rollout)
        except NonFiniteUpdate as error:
            if self.processes.is_main:
                try:
                    path = save_non_finite_batch(error, collected, config.output_dir)
                    error.add_note(f"its samples are in {path}; the checkpoints are from before this step")
                except NotWritten as unsaved:
                    error.add_note(str(unsaved))
            raise
        ended = time.perf_counter()
        scores = collected.rollout.scores
        metrics = {
            REWARD_MEAN: scores.mean().item(),
            REWARD_STD: scores.std().item() if len(scores) > 1 else 0.0,
            **component_statistics(collected.components),
            ENDED_SHARE: statistics.fmean(collected.ended),
            **result.statistics,
            "time/rollout_s": collected_at - began,
            "time/reward_wait_s": collected.waited_s,
            "time/update_s": ended - collected_at,
            "time/step_s": ended - began,
            "time/samples_per_second": len(scores) / (ended - began),
            "memory/rollout_peak_mib": rollout_peak.mib,
            "memory/update_peak_mib": update_peak.mib,
        }
        self.processes.on_main(lambda: self._write(log, step, metrics, collected))
        if log is not None:
            self.progress.step(metrics)
        return metrics

    def _write(self, log: MetricsLog | None, step: int, metrics: Mapping[str, float], collected: Collected) -> None:
        assert log is not None
        log.write(step, metrics)
        if self.config.log_samples_every and step % self.config.log_samples_every == 0:
            log.write_samples(step, sample_table(collected))

    def _collect_share(self) -> Collected:
        """This process's rows of the step's batch. Which prompts and draws they get is the batch's business alone."""
        config, step = self.config, self.stepper.steps_done
        prompts = self.schedule.batch(step)
        generation = config.generation.answering(config.prompts.kind)
        draws = Draws.of(generation, len(prompts), seed=config.seed, step=step)
        rows = self.processes.share(len(prompts))
        collected = collect(
            self.stepper,
            self.tokenizer,
            prompts.rows(rows.start, rows.stop),
            draws.rows(rows.start, rows.stop),
            config.generation,
            self.client,
            sample=self.sample,
            wait=self.stop.wait,
        )
        return collected if self.processes.count == 1 else collected.to("cpu")

    def _save_checkpoint(self) -> checkpoints.Checkpoint:
        return checkpoints.save_checkpoint(
            self.config.output_dir / CHECKPOINTS,
            self.policy,
            self.stepper,
            config=to_dict(self.config),
            reward_revision=self.client.revision,
            keep=self.config.keep_checkpoints,
            inputs=self.inputs,
        )


def penalised(rollout: Rollout, penalties: PenaltySettings, ended: Sequence[bool]) -> Rollout:
    """The rollout with what its responses lose for their length, and for not having ended by themselves."""
    samples = rollout.samples
    by_themselves = torch.tensor(ended, device=rollout.scores.device)
    scores = penalise_missing_eos(rollout.scores, by_themselves, penalties.missing_eos)
    scores = penalise_length(
        scores,
        samples.response_lengths,
        free_tokens=penalties.free_tokens,
        penalty_per_token=penalties.per_token,
    )
    return replace(rollout, scores=scores)


def component_statistics(components: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean and standard deviation of each reward, where there are several; of one the metrics say it already."""
    if len(components) == 1:
        return {}
    result = {}
    for name, scores in components.items():
        result[REWARD_COMPONENT.format(name=name, statistic="mean")] = statistics.fmean(scores)
        result[REWARD_COMPONENT.format(name=name, statistic="std")] = statistics.stdev(scores) if scores[1:] else 0.0
    return result


def sample_table(collected: Collected, rows: int = 8) -> list[tuple[str, str, float]]:
    """Some of a step's prompts, responses and scores."""
    scores = collected.rollout.scores[:rows].tolist()
    return list(zip(collected.prompts[:rows], collected.responses[:rows], scores, strict=True))


def _checkpoint_to_resume(config: PPOConfig) -> checkpoints.Checkpoint | None:
    root = config.output_dir / CHECKPOINTS
    existing = checkpoints.list_checkpoints(root)
    if config.resume is None:
        if existing:
            raise ConfigError(
                f"output_dir={config.output_dir} holds a run with checkpoints up to step {existing[-1].step}; "
                "go on with --resume auto, or give another --output-dir"
            )
        return None
    if config.resume == "auto":
        if not existing:
            return None
        chosen = existing[-1]
    else:
        chosen = checkpoints.read_checkpoint(Path(config.resume))
    for line in checkpoints.check_same_run(chosen.config, to_dict(config)):
        print(f"resuming with {line}")
    print(f"resuming after step {chosen.step} from {chosen.directory}")
    return chosen


def _connect(client: RewardClient, config: PPOConfig, resumed: checkpoints.Checkpoint | None, stop: StopSignal) -> str:
    try:
        stop.wait(client.connecting())
    except RewardRejected as error:
        error.leave_in(config.output_dir)
        raise
    revision = client.revision
    if resumed is None or config.reward.allow_revision_change or resumed.reward_revision in (None, revision):
        return revision
    raise RewardRejected(
        f"the reward model has changed since the checkpoint: {resumed.reward_revision} then, {revision} now; serve the "
        "same model, or pass --reward.allow-revision-change if the change is meant"
    )
