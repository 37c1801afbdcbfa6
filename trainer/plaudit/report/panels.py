"""The charts of a run: which figures there are, and how those of one run or of several are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plaudit.report.charts import Series, legend, line_chart
from plaudit.report.page import SMOOTHING, smooth
from plaudit.report.run_data import RunData
from plaudit.run.metrics import ENDED_SHARE, KL, KL_COEF, REWARD_MEAN

PALETTE = tuple(f"var(--c{i})" for i in range(8))


@dataclass(frozen=True)
class Panel:
    """One chart: a figure of the training, of the held-out answers, or of the audit."""

    title: str
    training: str = ""
    """Name in metrics.jsonl."""
    held_out: str = ""
    """Name in evaluations.jsonl, without its prefix."""
    audit: str = ""
    """Name in `report.audit`."""
    level: float | None = None
    """A value to compare with."""


LEARNING = (
    Panel("mean reward", REWARD_MEAN, "reward"),
    Panel("KL to the reference, nats per response", KL, "kl"),
    Panel("response length, tokens", "tokens/responses_len_mean", "length"),
    Panel("share of responses that ended", ENDED_SHARE, "ended_share"),
    Panel("win rate against the reference", held_out="win_rate", level=0.5),
)
UPDATES = (
    Panel("entropy, nats per response", "objective/entropy"),
    Panel("clip fraction", "ppo/policy/clipfrac"),
    Panel("value: explained variance", "ppo/val/var_explained"),
    Panel("KL coefficient", KL_COEF),
)
AUDIT = (
    Panel("correlation of reward and length", audit="length_correlation", level=0.0),
    Panel("repeated word trigrams within a response", audit="repeated_trigrams"),
    Panel("share of distinct responses", audit="distinct_share"),
)
QUANTILES = {"kl_p05": "5 %", "kl_p50": "median", "kl_p95": "95 %"}


def judge_panels(judges: Sequence[str]) -> list[Panel]:
    """The charts of further judges."""
    return [
        panel
        for name in judges
        for panel in (
            Panel(f"mean score of {name}", held_out=f"{name}/reward"),
            Panel(f"win rate by {name}", held_out=f"{name}/win_rate", level=0.5),
        )
    ]


def groups_of(run: RunData) -> list[dict[str, Any]]:
    """The charts of one run in groups, as the page's template takes them. Charts without numbers are left out."""
    best = None if run.best is None else run.best["step"]
    audits = run.audits()
    learning = [_of_run(panel, run, audits, best) for panel in (*LEARNING, *judge_panels(run.judges))]
    audit = [_of_run(panel, run, audits, best) for panel in (*AUDIT, *_correlations(run))]
    quantiles = [
        Series(label, *_audited(audits, name), colour=colour, points=True)
        for (name, label), colour in zip(QUANTILES.items(), ("var(--before)", "var(--kl)", "var(--down)"), strict=True)
    ]
    audit.append(_chart("KL by response: quantiles, nats", quantiles, best))
    held_out = "Points: held-out prompts, with 95 % intervals. " if run.evaluations else ""
    marked = "Dashed: the best evaluation. " if best is not None else ""
    source = "the held-out answers" if run.answers else "the rollouts"
    return _filled(
        ("Training and held-out", f"{held_out}{marked}Thin: each step. Thick: moving average.", learning),
        ("Updates", "Statistics of the PPO updates.", [_of_run(panel, run, audits, best) for panel in UPDATES]),
        (
            "Audit for over-optimisation",
            f"Of {source}. This is an audit: no figure is known that warns reliably before a policy exploits its "
            "reward model. Look for reward that comes with length, repetition, fewer distinct responses, or without "
            "the other judges, and read the samples.",
            audit,
        ),
    )


def groups_of_runs(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The charts of several runs, each in its own colour."""
    judges = list(dict.fromkeys(name for run in runs for name in run.judges))
    audits = [run.audits() for run in runs]

    def charts(panels: Sequence[Panel]) -> list[dict[str, Any] | None]:
        return [_of_runs(panel, runs, audits) for panel in panels]

    correlations = [Panel(f"correlation of reward and {name}", audit=f"{name}/correlation") for name in judges]
    return _filled(
        (
            "Training and held-out",
            "Points: held-out prompts, with 95 % intervals. Lines without points: training, moving average.",
            charts((*LEARNING, *judge_panels(judges))),
        ),
        ("Updates", "Statistics of the PPO updates, moving average.", charts(UPDATES)),
        (
            "Audit for over-optimisation",
            "Of the held-out answers, or the rollouts if there are none. No figure is known that warns reliably.",
            charts((*AUDIT, *correlations, Panel("KL by response: 95 % quantile, nats", audit="kl_p95"))),
        ),
    )


def _correlations(run: RunData) -> list[Panel]:
    return [Panel(f"correlation of reward and {name}", audit=f"{name}/correlation") for name in run.judges]


def _of_run(
    panel: Panel, run: RunData, audits: Mapping[int, Mapping[str, float]], best: float | None
) -> dict[str, Any] | None:
    series = []
    if panel.training:
        x, y = run.series(panel.training)
        series += [
            Series("each step", x, y, "var(--soft)", faint=True),
            Series("training", x, smooth(y, SMOOTHING), "var(--before)"),
        ]
    if panel.held_out:
        series.append(_held_out(panel.held_out, run, "held-out", "var(--after)"))
    if panel.audit:
        series.append(Series(panel.title, *_audited(audits, panel.audit), colour="var(--after)", points=True))
    return _chart(panel.title, series, best, panel.level, legends=not panel.audit)


def _of_runs(
    panel: Panel, runs: Sequence[RunData], audits: Sequence[Mapping[int, Mapping[str, float]]]
) -> dict[str, Any] | None:
    series = []
    for i, run in enumerate(runs):
        colour = PALETTE[i % len(PALETTE)]
        if panel.held_out and run.held_out(panel.held_out)[0]:
            series.append(_held_out(panel.held_out, run, run.name, colour))
        elif panel.training:
            x, y = run.series(panel.training)
            series.append(Series(run.name, x, smooth(y, SMOOTHING), colour))
        if panel.audit:
            series.append(Series(run.name, *_audited(audits[i], panel.audit), colour=colour, points=True))
    return _chart(panel.title, series, None, panel.level, legends=False)


def _held_out(name: str, run: RunData, label: str, colour: str) -> Series:
    x, y = run.held_out(name)
    low, high = run.held_out(f"{name}_low")[1], run.held_out(f"{name}_high")[1]
    if not len(low) == len(high) == len(y):
        low = high = []
    return Series(label, x, y, colour, points=True, low=low, high=high)


def _audited(audits: Mapping[int, Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    steps = [step for step in sorted(audits) if name in audits[step]]
    return [float(step) for step in steps], [audits[step][name] for step in steps]


def _chart(
    title: str, series: Sequence[Series], mark: float | None, level: float | None = None, *, legends: bool = True
) -> dict[str, Any] | None:
    drawn = [s for s in series if len(s.x)]
    if not drawn:
        return None
    svg = line_chart(title, drawn, mark=mark, level=level)
    return {"title": title, "legend": legend(drawn) if legends else "", "svg": svg}


def _filled(*groups: tuple[str, str, Sequence[dict[str, Any] | None]]) -> list[dict[str, Any]]:
    found = [
        {"title": title, "note": note, "charts": [chart for chart in charts if chart is not None]}
        for title, note, charts in groups
    ]
    return [group for group in found if group["charts"]]
