"""Tables and figure of `benchmarks.learning.against_trl`: each arm beside TRL, seed by seed and over all seeds."""

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.learning.analysis import Interval, Judged, common_kl, over_prompts, over_seeds, rewards_at
from benchmarks.learning.paired_runs import PLAUDIT, PRESET, TRL, Point, Result

PRICE_OF_KL = 0.06
"""What a nat costs in the choice of a side's point: the KL coefficient of the preset."""
COLOURS = {TRL: "#b3541e", PLAUDIT: "#1f6feb", PRESET: "#2e8b57"}
Arm = tuple[str, Point | None]
"""A side with its settings."""
Found = Mapping[tuple[Arm, int], Result]
"""By arm and seed."""


def worth(judged: Judged) -> float:
    """What the choice of a point maximises."""
    return judged.reward - PRICE_OF_KL * judged.kl


def tuning_table(tuning: Mapping[Arm, Judged], points: Mapping[str, Point]) -> list[str]:
    """The grid with the tuning seed, if there was a choice."""
    if not tuning:
        return []
    lines = [
        "| tuning | learning rate | KL coefficient | reward | KL | reward - 0.06 x KL | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (side, point), judged in tuning.items():
        assert point is not None
        chosen = "chosen" if points[side] == point else ""
        lines.append(
            f"| {side} | {point.learning_rate:g} | {point.init_kl_coef:g} | {judged.reward:+.2f} | {judged.kl:.2f} | "
            f"{worth(judged):+.2f} | {chosen} |"
        )
    return [*lines, ""]


@dataclass(frozen=True)
class Comparison:
    """One arm minus TRL, for each seed and over all of them."""

    equal_samples: Mapping[int, Interval]
    equal_kl: Mapping[int, Interval]
    kl: Mapping[int, float]
    """The common KL, where `equal_kl` was taken."""

    @property
    def no_worse(self) -> bool:
        """Whether no seed's interval at equal samples lies below 0."""
        return all(interval.high >= 0 for interval in self.equal_samples.values())

    @property
    def better(self) -> bool:
        """Whether the pooled interval at equal KL lies above 0."""
        return pooled(self.equal_kl).low > 0


def compare(found: Found, arm: Arm, trl: Arm, start: Judged) -> Comparison:
    """`arm` minus `trl`, seed by seed."""
    equal_samples, equal_kl, kls = {}, {}, {}
    for seed in sorted({seed for of, seed in found if of == arm}):
        one, other = found[arm, seed].curve(start), found[trl, seed].curve(start)
        equal_samples[seed] = over_prompts(one[-1].rewards, other[-1].rewards)
        kls[seed] = common_kl(one, other)
        equal_kl[seed] = over_prompts(rewards_at(one, kls[seed]), rewards_at(other, kls[seed]))
    return Comparison(equal_samples, equal_kl, kls)


def pooled(intervals: Mapping[int, Interval]) -> Interval:
    """Over seeds."""
    return over_seeds([interval.mean for interval in intervals.values()])


def report(found: Found, points: Mapping[str, Point], start: Judged) -> list[str]:
    """Tables of all comparisons, in Markdown, and whether the claims hold."""
    trl: Arm = (TRL, points[TRL])
    arms: list[Arm] = [(PLAUDIT, points[PLAUDIT]), *([(PRESET, None)] if any(a[0] == PRESET for a, _ in found) else [])]
    if points[TRL] != points[PLAUDIT]:
        arms.insert(1, (PLAUDIT, points[TRL]))
    lines = [f"Before training: reward {start.reward:+.2f}.", ""]
    for arm in arms:
        name = arm[0] if arm[1] is None else f"{arm[0]}, {arm[1]}"
        lines += [*comparison_table(found, arm, trl, compare(found, arm, trl, start), name), ""]
    return lines[:-1]


def comparison_table(found: Found, arm: Arm, trl: Arm, comparison: Comparison, name: str) -> list[str]:
    lines = [
        f"{name} beside trl, {trl[1]}:",
        "",
        "| seed | trl: reward, KL | reward, KL | difference at equal samples | common KL | difference at equal KL |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for seed, difference in comparison.equal_samples.items():
        ends = []
        for each in (trl, arm):
            result = found[each, seed]
            last = result.held_out[max(result.held_out, key=int)]
            ends.append(f"{last.reward:+.2f}, {last.kl:.2f}")
        lines.append(
            f"| {seed} | {' | '.join(ends)} | {difference} | {comparison.kl[seed]:.2f} | {comparison.equal_kl[seed]} |"
        )
    both = pooled(comparison.equal_samples), pooled(comparison.equal_kl)
    holds = {True: "holds", False: "does not hold"}
    return [
        *lines,
        f"| all | | | {both[0]} | | {both[1]} |",
        "",
        f"No worse at equal samples: {holds[comparison.no_worse]}. Better at equal KL: {holds[comparison.better]}.",
    ]


def draw(found: Found, points: Mapping[str, Point], start: Judged, samples_per_step: int) -> Figure:
    """Held-out reward against samples and against KL, one line a run."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_samples, by_kl = figure.subplots(1, 2)
    named: set[str] = set()
    for (arm, _), result in found.items():
        side, point = arm
        if point is not None and point != points[side]:
            continue
        curve = result.curve(start)
        samples = [0, *(int(step) * samples_per_step for step in sorted(result.held_out, key=int))]
        rewards = [judged.reward for judged in curve]
        label = None if side in named else side
        named.add(side)
        style = {"color": COLOURS[side], "linewidth": 1.4, "marker": "o", "markersize": 3}
        by_samples.plot(samples, rewards, label=label, **style)
        by_kl.plot([judged.kl for judged in curve], rewards, **style)
    for axes, what in ((by_samples, "samples"), (by_kl, "KL to the reference, nats")):
        axes.set_title(f"held-out reward against {what}", loc="left", fontsize=11)
        axes.set_xlabel(what)
        axes.set_xlim(left=0)
        axes.grid(color="#e3e7ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    by_samples.legend(frameon=False)
    return figure
