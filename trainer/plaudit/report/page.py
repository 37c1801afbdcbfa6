"""Reports of a run: a self-contained HTML page, samples.csv, and tables for the console."""

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit.report.evaluation import Answers, Evaluation, Summary
from plaudit.report.policies import Measured, PolicyFigures
from plaudit.run.metrics import KL, REWARD_MEAN

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLOURS = {"before": "#8a94a3", "after": "#1f6feb", "kl": "#b3541e"}
INK, SOFT, RULE, GRID = "#1c2430", "#5b6675", "#c4cad2", "#e3e7ec"
SAMPLES_IN_REPORT = 50
SAMPLES_ON_CONSOLE = 8
SMOOTHING = 0.8
"""Weight of the past in the moving average of the training curves."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Sample:
    """A prompt and both policies' answers; the columns of samples.csv."""

    query: str
    response_before: str
    response_after: str
    reward_before: float
    reward_after: float

    @property
    def change(self) -> float:
        """The difference of the rewards, after minus before."""
        return self.reward_after - self.reward_before


def pair_samples(prompts: Sequence[str], before: Answers, after: Answers) -> list[Sample]:
    """One sample per prompt, in order."""
    columns = (prompts, before.texts, after.texts, before.rewards, after.rewards)
    return [Sample(*row) for row in zip(*columns, strict=True)]


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """samples.csv: query, response_before, response_after, reward_before, reward_after.

    Texts that a spreadsheet would run as formulas get a leading apostrophe.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("query", "response_before", "response_after", "reward_before", "reward_after"))
        for row in samples:
            texts = map(_as_text, (row.query, row.response_before, row.response_after))
            writer.writerow((*texts, repr(row.reward_before), repr(row.reward_after)))


def _as_text(text: str) -> str:
    """The text, escaped so that a spreadsheet doesn't run it as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def render_report(
    *,
    title: str,
    evaluation: Evaluation,
    samples: Sequence[Sample],
    policies: Sequence[PolicyFigures] = (),
    training: Sequence[Mapping[str, float]] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The report as a self-contained HTML document.

    Args:
        policies: figures of all policies, with their judges.
        training: the steps of metrics.jsonl; without them the training curves are left out.
        settings: the configuration of each stage by the stage's name, as `config.to_dict` gives it.
    """
    curves = [row for row in training if REWARD_MEAN in row and KL in row]
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            subtitle=f"{evaluation.n} held-out prompts, answered before and after PPO with the same seeds.",
            verdict=verdict(evaluation),
            evaluation=evaluation,
            policies=policy_rows(policies) if policies else None,
            colours=COLOURS,
            distributions=data_uri(plot_distributions(samples, evaluation)),
            training=data_uri(plot_training(curves)) if curves else None,
            steps=len(curves),
            samples=samples[:SAMPLES_IN_REPORT],
            settings={name: grouped(values) for name, values in (settings or {}).items()},
        )
    )


def templates() -> "jinja2.Environment":
    """The pages' templates. Every text in them is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plaudit.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=as_number, signed=_signed)
    return environment


def verdict(evaluation: Evaluation) -> str:
    """One sentence on whether the reward changed, based on the interval of the paired difference."""
    low, high = evaluation.reward.difference.ci95
    if low > 0:
        return "The reward rose: the whole 95 % interval of the paired difference lies above zero."
    if high < 0:
        return "The reward fell: the whole 95 % interval of the paired difference lies below zero."
    return "No change is shown: the 95 % interval of the paired difference contains zero."


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Bias-corrected exponential moving average: sum_i w^(t-i) x_i / sum_i w^(t-i), i = 0..t."""
    result = []
    total = norm = 0.0
    for value in values:
        total = weight * total + value
        norm = weight * norm + 1
        result.append(total / norm)
    return result


def plot_training(steps: Sequence[Mapping[str, float]]) -> "Figure":
    """Mean reward and KL by step, each with its moving average."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(width=10, height=3.4)
    panels = ((REWARD_MEAN, "mean reward", COLOURS["after"]), (KL, "KL to the reference, nats", COLOURS["kl"]))
    x = [row["step"] for row in steps]
    for number, (name, label, colour) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        y = [row[name] for row in steps]
        axes.plot(x, y, color=colour, alpha=0.35, linewidth=1, marker="." if len(x) == 1 else None)
        axes.plot(x, smooth(y, SMOOTHING), color=colour, linewidth=2.2)
        axes.set_xlabel("PPO step")
        axes.set_title(label, loc="left", fontsize=11, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    return figure


def plot_distributions(samples: Sequence[Sample], evaluation: Evaluation) -> "Figure":
    """Histograms of the rewards over the same bins, and the means."""
    import numpy as np

    before = np.array([row.reward_before for row in samples])
    after = np.array([row.reward_after for row in samples])
    bins = np.histogram_bin_edges(np.concatenate([before, after]), bins=36).tolist()
    figure = new_figure(width=10, height=3.4)
    axes = figure.add_subplot()
    for name, values, mean in (
        ("before", before, evaluation.reward.before.mean),
        ("after", after, evaluation.reward.after.mean),
    ):
        axes.hist(values, bins=bins, color=COLOURS[name], alpha=0.55, label=f"{name}, mean {as_number(mean)}")
        axes.axvline(mean, color=COLOURS[name], linewidth=2)
    axes.set_xlabel("reward")
    axes.set_title("responses by reward", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def summary_table(evaluation: Evaluation) -> "Table":
    """For the console: rewards before and after with their intervals, KL, perplexity, distinct responses."""
    from rich.table import Table

    table = Table(title=f"Before and after PPO, {evaluation.n} held-out prompts", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "after − before"):
        table.add_column(name, justify="right")
    reward, ppl, distinct = evaluation.reward, evaluation.perplexity, evaluation.distinct_responses
    table.add_row(
        "reward, mean", as_number(reward.before.mean), as_number(reward.after.mean), _signed(reward.difference.mean)
    )
    table.add_row(
        "  95 % interval",
        _interval(reward.before),
        _interval(reward.after),
        f"{_signed(reward.difference.ci95[0])} to {_signed(reward.difference.ci95[1])}",
    )
    table.add_row("reward, median", as_number(reward.before.median), as_number(reward.after.median), "")
    table.add_row("KL to the reference, nats", "", as_number(evaluation.kl), "")
    table.add_row(
        "perplexity under the reference", as_number(ppl.before, 1), as_number(ppl.after, 1), f"× {as_number(ppl.ratio)}"
    )
    table.add_row("distinct responses", str(distinct.before), str(distinct.after), "")
    return table


def policy_rows(policies: Sequence[PolicyFigures]) -> list[list[str]]:
    """Names of the figures, then one row of texts for each policy. Every figure but the count has its interval."""
    judges = list(policies[0].judges)
    names = ["policy", "reward", "median", "win rate", "KL, nats", "perplexity", "× before", "length", "distinct"]
    rows = [names + [f"{name}{figure}" for name in judges for figure in ("", ", win rate")]]
    for each in policies:
        figures = [each.reward.mean, each.reward.median, each.reward.win_rate, each.kl]
        row = [each.policy, *map(_measured, figures), _measured(each.perplexity, 1), _measured(each.perplexity_ratio)]
        row += [_measured(each.length, 1), str(each.distinct_responses)]
        for name in judges:
            row += [_measured(each.judges[name].mean), _measured(each.judges[name].win_rate)]
        rows.append(row)
    return rows


def policies_table(policies: Sequence[PolicyFigures]) -> "Table":
    """For the console: one column for each policy, one row for each figure with its interval."""
    from rich.table import Table
    from rich.text import Text

    names, *rows = policy_rows(policies)
    table = Table(title="Every policy, with 95 % intervals", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(Text(row[0]), justify="right")
    for i, name in enumerate(names[1:], start=1):
        table.add_row(Text(name), *(row[i] for row in rows))
    return table


def _measured(figure: Measured | None, digits: int = 2) -> str:
    if figure is None:
        return ""
    low, high = (as_number(end, digits) for end in figure.ci95)
    return f"{as_number(figure.value, digits)} ({low} to {high})"


def samples_table(samples: Sequence[Sample], count: int = SAMPLES_ON_CONSOLE) -> "Table":
    """For the console: the first few samples."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"The first {min(count, len(samples))} of {len(samples)}, not selected", title_justify="left")
    for name in ("query", "response before", "response after"):
        table.add_column(name, ratio=1)
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in samples[:count]:
        # Text instead of str, because rich would interpret markup in a response.
        texts = (Text(" ".join(t.split())) for t in (row.query, row.response_before, row.response_after))
        table.add_row(*texts, as_number(row.reward_before), as_number(row.reward_after))
    return table


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: "Axes") -> None:
    """The look that all charts share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(SOFT)


def data_uri(figure: "Figure") -> str:
    """The figure as the address of an image in the page itself."""
    # An image, not inline SVG: the ids of two inline figures may clash.
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def grouped(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings in groups, one level deep. Ungrouped settings come first, in a group without a name."""
    groups: dict[str, dict[str, Any]] = {"": {}}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            groups[key] = dict(value)
        else:
            groups[""][key] = value
    return groups


def as_number(value: float, digits: int = 2) -> str:
    """With a real minus sign, and none in front of a zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _signed(value: float, digits: int = 2) -> str:
    text = as_number(value, digits)
    return text if text.startswith("−") else f"+{text}"


def _interval(summary: Summary) -> str:
    return f"{as_number(summary.ci95[0])} to {as_number(summary.ci95[1])}"
