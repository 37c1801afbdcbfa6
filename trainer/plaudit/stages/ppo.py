"""Stage 3: PPO. It trains a policy on prompts with rewards, and writes adapters, value head, metrics and a model card.

`set_up` prepares the run, `train` takes the steps, and `take_step` is one step from prompts to metrics.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plaudit.learner.memory import measuring_peak
from plaudit.learner.step_statistics import std_or_zero
from plaudit.policy.samples import Rollout
from plaudit.ppo.rewards import penalise_length, penalise_missing_eos
from plaudit.report.held_out import evaluation_line
from plaudit.rewards import RewardRejected, RewardUnavailable
from plaudit.run.evaluations import reason_to_stop
from plaudit.run.hub import push_results, require_pushable
from plaudit.run.metrics import ENDED_SHARE, REWARD_COMPONENT, REWARD_MEAN, REWARD_STD
from plaudit.run.post_mortem import keeping_non_finite_batch
from plaudit.run.runtime import StopRequested
from plaudit.run.storage import NotWritten
from plaudit.settings.ppo import PenaltySettings, PPOConfig
from plaudit.settings.report import ReportConfig
from plaudit.stages import report
from plaudit.stages.check import tell_estimates, tell_prompt, tell_rewards, tried_out
from plaudit.stages.ppo_results import write_results
from plaudit.stages.ppo_setup import Training, set_up


@dataclass(frozen=True)
class PPOResult:
    """The directory of the trained policy, and the last step's metrics."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]


def run(config: PPOConfig) -> PPOResult:
    """Train from the start or from a checkpoint, and write all results to `config.output_dir`.

    With `config.check` nothing is trained (see `check`).

    Raises:
        PlauditError: the message says what to do, and whether `--resume auto` can continue.
    """
    require_pushable(config.push_to_hub)
    if config.check:
        return check(config)
    with set_up(config) as training:
        metrics = train(training)
        save_results(training)
    if training.stepper.processes.is_main:
        push_results(config.output_dir, config.push_to_hub, private=config.hub_private)
    return PPOResult(config.output_dir, training.stepper.steps_done, metrics)


def train(training: Training) -> dict[str, float]:
    """Take all remaining steps; return the last one's metrics.

    If the run ends early, it saves a checkpoint of the last complete step, and the error names it.
    """
    config, stepper = training.config, training.stepper
    metrics: dict[str, float] = {}
    with training.log.showing():
        try:
            while not is_finished(training):
                metrics = take_step(training)
                if stepper.steps_done % config.checkpoint_every == 0 or stepper.steps_done == training.total_steps:
                    training.save_checkpoint()
                stepper.processes.on_all(training.stop.check)
            if stepper.steps_done < training.total_steps:
                training.save_checkpoint()
        except (RewardUnavailable, RewardRejected, StopRequested) as error:
            if isinstance(error, RewardRejected) and stepper.processes.is_main:
                error.leave_in(config.output_dir)
            try:
                saved = training.save_checkpoint()
                error.add_note(f"checkpoint {saved.directory} written, for --resume auto to go on from")
            except NotWritten as unsaved:
                error.add_note(f"no checkpoint of the last step: {unsaved}")
            raise
    return metrics


def is_finished(training: Training) -> bool:
    """Whether the run ends here. Evaluates the policy first, if that is due; it may end the run early."""
    held_out, stepper = training.held_out, training.stepper
    if held_out is None:
        return stepper.steps_done >= training.total_steps
    if held_out.is_due:
        record = held_out.evaluate(reward_revision=training.client.revision, inputs=dict(training.inputs))
        training.log.write_evaluation(record)
        if stepper.processes.is_main:
            print(evaluation_line(record, training.config), flush=True)
    reason = reason_to_stop(held_out.records, training.config.watch)
    if reason is not None and stepper.processes.is_main:
        print(f"the run ends early: {reason}", flush=True)
    return reason is not None or stepper.steps_done >= training.total_steps


def check(config: PPOConfig) -> PPOResult:
    """Dry run: take one step in memory, discard it, and report what a run would do and need.

    Raises:
        PlauditError: any error that `run` would raise before its second step, or too little disk space.
    """
    with tried_out(config) as training:
        tell_prompt(training)
        done = training.stepper.steps_done
        tell_rewards(training.rollouts.collect(done))
        metrics = take_step(training)
        tell_estimates(config, training, metrics, steps=training.total_steps - done)
    return PPOResult(config.output_dir, done, metrics)


def take_step(training: Training) -> dict[str, float]:
    """One PPO step: generate, score, token rewards, advantages, learn, log. All processes take it together."""
    config, stepper, step = training.config, training.stepper, training.stepper.steps_done
    began = time.perf_counter()
    # Generate responses; while the service scores them, evaluate them under policy and reference.
    with measuring_peak(stepper.policy.device) as rollout_peak:
        collected = training.rollouts.collect(step)
    scored = time.perf_counter()
    with (
        measuring_peak(stepper.policy.device) as update_peak,
        keeping_non_finite_batch(collected, config.output_dir, stepper.processes),
    ):
        rollout = penalised(collected.rollout, config.penalties, collected.ended)
        # Token rewards (KL penalty at each token, score at the last one), then advantages (GAE).
        experience = stepper.make_experience(rollout)
        # Epochs of clipped mini-batch updates, then the KL coefficient.
        result = stepper.learn(experience)
    ended = time.perf_counter()
    metrics = {
        **reward_statistics(collected.rollout.scores, collected.components),
        ENDED_SHARE: statistics.fmean(collected.ended),
        **result.statistics,
        "time/rollout_s": scored - began,
        "time/reward_wait_s": collected.waited_s,
        "time/update_s": ended - scored,
        "time/step_s": ended - began,
        "time/samples_per_second": len(rollout) / (ended - began),
        "memory/rollout_peak_mib": rollout_peak.mib,
        "memory/update_peak_mib": update_peak.mib,
    }
    training.log.write(step, metrics, collected, result)
    return metrics


def penalised(rollout: Rollout, penalties: PenaltySettings, ended: Sequence[bool]) -> Rollout:
    """The rollout with penalties subtracted from its scores: for length, and for responses that have not `ended`."""
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


def reward_statistics(scores: torch.Tensor, components: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean and standard deviation of the scores [B] as received, and of each reward if there are several."""
    result = {REWARD_MEAN: scores.mean().item(), REWARD_STD: std_or_zero(scores)}
    for name, parts in components.items() if len(components) > 1 else ():
        result[REWARD_COMPONENT.format(name=name, statistic="mean")] = statistics.fmean(parts)
        result[REWARD_COMPONENT.format(name=name, statistic="std")] = statistics.stdev(parts) if parts[1:] else 0.0
    return result


def save_results(training: Training) -> None:
    """Write the results of a finished run, besides its metrics and checkpoints. All processes call this.

    Raises:
        NotWritten: a file can't be written.
        NotFinite, NotAsSaved: the policy is not finite, or its files read back differently.
    """
    config = training.config
    policy, processes, tokenizer = training.stepper.policy, training.stepper.processes, training.rollouts.tokenizer
    weights = processes.full_weights_on_main(policy)
    if processes.is_main:
        write_results(config, policy, tokenizer, reward_revision=training.client.revision, weights=weights)
        print(f"trained {training.stepper.steps_done} steps; what they made is in {config.output_dir}")
        if config.watch.rollouts != "off" or config.watch.eval_every is not None:
            report.run(ReportConfig(config.output_dir))
