"""What went up and what went down in a run, in words that claim no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plaudit.report.evaluation import mean_ci95
from plaudit.report.run_data import RunData
from plaudit.run.metrics import KL, REWARD_MEAN

SHARE = 10
"""Without evaluations, the first and the last tenth of the steps are compared."""
LENGTH = "tokens/responses_len_mean"
ENTROPY = "objective/entropy"


@dataclass(frozen=True)
class Changed:
    """One figure at the first and at the last evaluation, paired by prompt. Only the difference has an interval."""

    name: str
    first: float
    last: float
    ci95: tuple[float, float] | None
    """Of the mean difference, last minus first; None where no pairs are known."""

    @property
    def direction(self) -> int:
        """1 or -1 if the whole interval lies above or below zero, else 0. Without an interval, the sign."""
        low, high = self.ci95 or (self.last - self.first,) * 2
        return 1 if low > 0 else -1 if high < 0 else 0


def changes(run: RunData) -> list[Changed]:
    """The figures of the run, first against last: of held-out answers by prompt, else of the training's steps."""
    steps = sorted(run.answers)
    if len(steps) > 1:
        return held_out_changes(run.answers[steps[0]], run.answers[steps[-1]])
    count = max(1, len(run.metrics) // SHARE)
    found = []
    for name, metric in (("reward", REWARD_MEAN), ("KL", KL), ("length", LENGTH), ("entropy", ENTROPY)):
        values = run.series(metric)[1]
        if len(values) > 1:
            found.append(Changed(name, float(np.mean(values[:count])), float(np.mean(values[-count:])), None))
    return found


def held_out_changes(first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]]) -> list[Changed]:
    """Each figure of the answers to the same prompts, with the interval of the paired difference."""
    pairs: dict[str, tuple[list[float], list[float]]] = {"reward": _column(first, last, lambda row: row["reward"])}
    for judge in first[0]["judges"]:
        pairs[judge] = _column(first, last, lambda row, judge=judge: row["judges"][judge])
    pairs["KL"] = _column(first, last, lambda row: row["kl"])
    pairs["length"] = _column(first, last, lambda row: float(row["length"]))
    pairs["ended share"] = _column(first, last, lambda row: float(row["finish_reason"] == "stop"))
    return [
        Changed(
            name,
            float(np.mean(before)),
            float(np.mean(after)),
            mean_ci95([b - a for a, b in zip(before, after, strict=True)], resamples=2000),
        )
        for name, (before, after) in pairs.items()
    ]


def _column(first, last, value) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    return [value(row) for row in first], [value(row) for row in last]


def paragraph(run: RunData) -> list[str]:
    """The honest account of a run, one sentence each."""
    found = changes(run)
    if not found:
        return ["There are not enough steps yet to say what went up or down."]
    by_prompt = found[0].ci95 is not None
    said = {
        1: [_said(each) for each in found if each.direction > 0],
        -1: [_said(each) for each in found if each.direction < 0],
    }
    still = [each.name for each in found if each.direction == 0]
    if by_prompt:
        steps = sorted(run.answers)
        begin = f"On {len(run.answers[steps[0]])} held-out prompts, from step {steps[0]} to step {steps[-1]}"
    else:
        begin = "In training, from the first tenth of the steps to the last (other prompts each, so without intervals)"
    sentences = [
        f"{begin}, these went up: {', '.join(said[1]) or 'none'}; these went down: {', '.join(said[-1]) or 'none'}."
    ]
    if still:
        sentences.append(
            f"No change is shown for {', '.join(still)}: the 95 % interval of the difference contains zero."
        )
    sentences += _judges(run, found)
    best = run.best
    if best is not None and best["step"] < run.evaluations[-1]["step"]:
        sentences.append(
            f"The best {run.watch.best_by} was after step {best['step']}, before the last evaluation after step "
            f"{run.evaluations[-1]['step']}; that difference may be chance."
        )
    return sentences


def _judges(run: RunData, found: Sequence[Changed]) -> list[str]:
    """How the reward and the judges that the policy does not learn from went."""
    by_name = {each.name: each for each in found}
    reward, judges = by_name["reward"], [by_name[name] for name in run.judges if name in by_name]
    if not judges:
        return ["No other judge has scored the responses: a higher reward alone does not show that they became better."]
    apart = [judge.name for judge in judges if reward.direction > 0 and judge.direction <= 0]
    if apart:
        names = " and ".join(apart)
        return [
            f"The reward rose and {names} did not: the policy may have learned what pleases the reward model alone. "
            "Read the samples."
        ]
    if reward.direction > 0:
        return ["The other judges rose with the reward, so the gain is not one of the reward model alone."]
    return []


def _said(change: Changed) -> str:
    interval = ""
    if change.ci95 is not None:
        interval = f", difference {change.last - change.first:+.2f} ({change.ci95[0]:+.2f} to {change.ci95[1]:+.2f})"
    return f"{change.name} ({change.first:.2f} to {change.last:.2f}{interval})".replace("-", "−")
