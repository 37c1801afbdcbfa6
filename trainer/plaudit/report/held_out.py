"""Evaluation while training: the policy answers the same held-out prompts with the same random numbers each time.

`HeldOut.evaluate` is one evaluation. It draws nothing from the training's random numbers and moves no weight, so a run
ends with the same weights with evaluations or without.

Failure modes: an evaluation that depends on when the run was resumed; a best checkpoint of other weights than those
that were evaluated.
"""

import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from plaudit.data.prompts import Prompts, load_prompts
from plaudit.errors import NotFinite
from plaudit.learner.rollout import RolloutCollector, Sampler, collect_rollout
from plaudit.policy.checks import check_prompts, room_for_prompts
from plaudit.policy.generation import Draws, generate
from plaudit.policy.samples import Samples
from plaudit.policy.saving import check_saved, save_policy
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.ppo.masked import masked_sum
from plaudit.report.comparison import win_rate_by_scores
from plaudit.report.evaluation import mean_ci95
from plaudit.report.run_data import SETTINGS_FILE
from plaudit.rewards import RewardClient
from plaudit.run.checkpoint import MANIFEST, contents
from plaudit.run.evaluations import BEST, PREFIX, best_of, read_evaluations, write_answers
from plaudit.run.runtime import exclusive
from plaudit.run.storage import replaced_model
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig


@dataclass(frozen=True)
class HeldOutAnswers:
    """Answers to all held-out prompts, in order."""

    texts: list[str]
    rewards: list[float]
    """As received: the weighted sum."""
    judged: dict[str, list[float]]
    """Scores of the further judges, by name."""
    kls: list[float]
    """log p - log p_ref of each response under the sampling distribution, in nats."""
    lengths: list[int]
    """In tokens."""
    ended: list[bool]

    @classmethod
    def concatenate(cls, parts: Sequence["HeldOutAnswers"]) -> "HeldOutAnswers":
        """All answers in order."""
        judged = {name: [score for part in parts for score in part.judged[name]] for name in parts[0].judged}
        names = ("texts", "rewards", "kls", "lengths", "ended")
        return cls(judged=judged, **{name: [x for part in parts for x in getattr(part, name)] for name in names})


@dataclass
class HeldOut:
    """The evaluations of one run. All processes call its methods together."""

    config: PPOConfig
    rollouts: RolloutCollector
    prompts: Prompts
    judges: RewardClient | None
    cached: bool
    """Whether the policy can sample with its cache."""
    records: list[dict[str, float]]
    """The evaluations so far, those before a resume included."""
    _reference: HeldOutAnswers | None = field(default=None, repr=False)

    @property
    def is_due(self) -> bool:
        """Whether the policy must be evaluated as it is now."""
        done, every = self.rollouts.stepper.steps_done, self.config.watch.eval_every
        assert every is not None
        at_the_end = done == self.rollouts.stepper.total_steps
        return (done % every == 0 or at_the_end) and all(record["step"] != done for record in self.records)

    def evaluate(self, *, reward_revision: str, inputs: dict[str, str]) -> dict[str, float]:
        """Evaluate, write the answers, and keep the policy in `best` if it is the best so far. Returns the record.

        Raises:
            RewardUnavailable, RewardRejected: rewards or a judge's scores are missing.
            NotFinite: a reward or a log-probability is not finite.
            NotWritten: a file can't be written.
        """
        stepper = self.rollouts.stepper
        if self._reference is None:
            self._reference = self._answers(self._sample_reference)
        answers = self._answers(self.rollouts.sample)
        record = {"step": stepper.steps_done, **figures(answers, self._reference)}
        stepper.processes.on_main(self._write_answers, answers)
        best = best_of([*self.records, record], self.config.watch)
        if best is record:
            save_best(self.config, self.rollouts, record, reward_revision=reward_revision, inputs=inputs)
        self.records.append(record)
        return record

    def _answers(self, sample: Sampler) -> HeldOutAnswers:
        policy, processes = self.rollouts.stepper.policy, self.rollouts.stepper.processes
        with processes.gathered_weights(policy):
            return HeldOutAnswers.concatenate(processes.on_all(self._own_answers, sample))

    def _own_answers(self, sample: Sampler) -> HeldOutAnswers:
        """This process's share. Prompts and random numbers don't depend on the processes or the step."""
        rollouts, stepper = self.rollouts, self.rollouts.stepper
        draws = Draws.of(rollouts.settings, len(self.prompts), seed=self.config.seed, step=0)
        own = stepper.processes.share(len(self.prompts))
        prompts = self.prompts.rows(own.start, own.stop)
        collected = collect_rollout(
            stepper,
            rollouts.tokenizer,
            prompts,
            draws.rows(own.start, own.stop),
            rollouts.settings,
            rollouts.rewarder,
            sample=sample,
            wait=rollouts.wait,
        )
        judged: dict[str, list[float]] = {}
        if self.judges is not None:
            future = self.judges.submit_components(prompts.judged, collected.responses, prompts.fields)
            judged = rollouts.wait(future).components
        rollout = collected.rollout
        return HeldOutAnswers(
            texts=collected.responses,
            rewards=rollout.scores.tolist(),
            judged=judged,
            kls=masked_sum(rollout.logprobs - rollout.ref_logprobs, rollout.samples.mask, dim=1).tolist(),
            lengths=rollout.samples.response_lengths.tolist(),
            ended=collected.ended,
        )

    def _sample_reference(self, queries: Sequence[Sequence[int]], draws: Draws) -> Samples:
        settings, tokenizer = self.rollouts.settings, self.rollouts.tokenizer
        with self.rollouts.stepper.policy.as_reference() as model:
            return (generate if self.cached else generate_uncached)(model, queries, draws, settings, tokenizer)

    def _write_answers(self, answers: HeldOutAnswers) -> None:
        rows = [
            {
                "step": self.rollouts.stepper.steps_done,
                "row": i,
                "prompt": prompt,
                "response": answers.texts[i],
                "reward": answers.rewards[i],
                "judges": {name: scores[i] for name, scores in answers.judged.items()},
                "kl": answers.kls[i],
                "length": answers.lengths[i],
                "finish_reason": "stop" if answers.ended[i] else "length",
            }
            for i, prompt in enumerate(self.prompts.texts)
        ]
        write_answers(self.config.output_dir, self.rollouts.stepper.steps_done, rows)


def figures(answers: HeldOutAnswers, reference: HeldOutAnswers) -> dict[str, float]:
    """The figures of one evaluation. NAME_low and NAME_high are the 95 % interval of NAME over prompts.

    A response wins against the reference's response to the same prompt if its score is higher; a tie counts 1/2.

    Raises:
        NotFinite: a score or a KL is not finite.
    """
    result = _mean_and_interval("kl", answers.kls) | _mean_and_interval("length", answers.lengths)
    result |= {f"{PREFIX}ended_share": statistics.fmean(answers.ended)}
    scores = {"": (answers.rewards, reference.rewards)}
    scores |= {f"{name}/": (own, reference.judged[name]) for name, own in answers.judged.items()}
    for name, (own, against) in scores.items():
        result |= _mean_and_interval(f"{name}reward", own)
        rate = win_rate_by_scores(own, against)
        result |= _with_interval(f"{name}win_rate", rate.mean, rate.ci95)
    return result


def _mean_and_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    mean = statistics.fmean(values)
    if not abs(mean) < float("inf"):
        raise NotFinite(f"the held-out {name} is {mean}, so no figure means anything: look at the policy's weights")
    return _with_interval(name, mean, mean_ci95(values))


def _with_interval(name: str, mean: float, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{PREFIX}{name}": mean, f"{PREFIX}{name}_low": interval[0], f"{PREFIX}{name}_high": interval[1]}


def open_held_out(
    config: PPOConfig,
    rollouts: RolloutCollector,
    held: ExitStack,
    *,
    cached: bool,
    on_wait: Any,
    inputs: dict[str, str],
) -> HeldOut | None:
    """Load the held-out prompts and connect to the further judges; None if evaluation is off.

    Adds the prompts' fingerprint to `inputs`. `held` closes the connections.

    Raises:
        ConfigError: there are no held-out prompts, or they don't fit into the model.
        RewardUnavailable, RewardRejected: a judge doesn't answer, or its answer can't be used.
    """
    watch, stepper = config.watch, rollouts.stepper
    if watch.eval_every is None:
        return None
    model = stepper.policy.language_model
    room = room_for_prompts(model, config.generation)
    prompts = load_prompts(
        config.dataset,
        config.prompts,
        rollouts.tokenizer,
        "held_out",
        seed=config.seed,
        limit=watch.eval_prompts,
        room=room,
    )
    check_prompts(rollouts.tokenizer, model, prompts.token_ids, config.generation, config.policy)
    if len(prompts) < watch.eval_prompts and stepper.processes.is_main:
        print(
            f"watch.eval_prompts={watch.eval_prompts}: there are {len(prompts)} held-out prompts; all of them are used"
        )
    inputs["held-out prompts"] = prompts.fingerprint()
    # Later ones are repeated.
    records = [record for record in read_evaluations(config.output_dir) if record["step"] <= stepper.steps_done]
    judges = None
    if watch.judges.says_whom_to_ask:
        judges = held.enter_context(
            RewardClient(watch.named_judges, fields=config.prompts.fields, on_wait=on_wait, environment_key=False)
        )
        stepper.processes.on_all(_connect, judges, rollouts)
    return HeldOut(config, rollouts, prompts, judges, cached, records)


def _connect(judges: RewardClient, rollouts: RolloutCollector) -> None:
    rollouts.wait(judges.connecting())  # type: ignore[arg-type]  # it waits for any future


def save_best(
    config: PPOConfig,
    rollouts: RolloutCollector,
    record: dict[str, float],
    *,
    reward_revision: str,
    inputs: dict[str, str],
) -> None:
    """Replace OUTPUT_DIR/best by the policy as it is now: its files as `plaudit ppo` writes them, and a checkpoint.

    All processes call this. Raises `NotWritten`; the earlier best then stays.
    """
    stepper, tokenizer = rollouts.stepper, rollouts.tokenizer
    policy, processes = stepper.policy, stepper.processes
    manifest, fill = contents(policy, stepper, config=to_dict(config), reward_revision=reward_revision, inputs=inputs)
    weights = processes.full_weights_on_main(policy)
    directory = config.output_dir / BEST

    def write() -> None:
        with exclusive(directory), replaced_model(directory) as beside:
            save_policy(policy, beside, weights)
            tokenizer.save_pretrained(beside)
            check_saved(policy, beside, weights)
            fill(beside)
            (beside / SETTINGS_FILE).write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
            best = manifest | {"evaluation": record}
            (beside / MANIFEST).write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")

    processes.on_main(write)


def evaluation_line(record: dict[str, float], config: PPOConfig) -> str:
    """One evaluation for people."""

    def shown(name: str, digits: int = 2) -> str:
        value, low, high = (record[f"{PREFIX}{name}{end}"] for end in ("", "_low", "_high"))
        return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    parts = [f"held-out after step {record['step']}: reward {shown('reward')}", f"KL {shown('kl')}"]
    parts += [f"win rate {shown('win_rate')}", f"length {record[PREFIX + 'length']:.1f}"]
    parts += [f"{c.name} {shown(c.name + '/reward')}" for c in config.watch.named_judges.components]
    return "  ".join(parts)
