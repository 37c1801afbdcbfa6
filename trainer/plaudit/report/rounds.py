"""The rounds of a loop, for people: one HTML file that needs nothing else, and a table for the console."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plaudit.report.page import COLOURS, as_number, data_uri, new_figure, templates, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def render_rounds(records: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The page of records as rounds.jsonl holds them."""
    return (
        templates()
        .get_template("rounds.html.j2")
        .render(title=title, records=records, colours=COLOURS, chart=data_uri(plot_rounds(records)))
    )


def plot_rounds(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """By round: win rates against stage 1 with their intervals, the held-out accuracy, KL."""
    from matplotlib.ticker import MaxNLocator

    made = new_figure(width=10, height=3.4)
    rounds = [record["round"] for record in records]
    left, middle, right = (made.add_subplot(1, 3, place) for place in (1, 2, 3))
    for by, colour in (("reward_model", COLOURS["before"]), ("judge", COLOURS["after"])):
        rates = [record["win_rates"].get(by, {}).get("stage-1") for record in records]
        if all(rates):
            means = [rate["mean"] for rate in rates]
            ends = [[abs(rate["ci95"][i] - rate["mean"]) for rate in rates] for i in (0, 1)]
            left.errorbar(rounds, means, yerr=ends, marker="o", color=colour, label=by.replace("_", " "))
    left.axhline(0.5, color=COLOURS["kl"], linewidth=1)
    left.legend(frameon=False)
    accuracy = [record["held_out_accuracy"] for record in records]
    ends = [[abs(r["held_out_ci95"][i] - r["held_out_accuracy"]) for r in records] for i in (0, 1)]
    middle.errorbar(rounds, accuracy, yerr=ends, marker="o", color=COLOURS["after"])
    middle.axhline(0.5, color=COLOURS["kl"], linewidth=1)
    right.plot(rounds, [record["kl"] for record in records], marker="o", color=COLOURS["kl"])
    for axes, label in (
        (left, "win rate against stage 1"),
        (middle, "held-out accuracy of the reward model"),
        (right, "KL to stage 1, nats"),
    ):
        axes.set_xlabel("round")
        axes.set_title(label, loc="left", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    return made


def rounds_table(records: Sequence[Mapping[str, Any]]) -> "Table":
    """For the console."""
    from rich.table import Table

    table = Table(title="Rounds", title_justify="left")
    for name in ("round", "rankings", "agreement", "held-out pairs", "reward", "KL", "won against", "by"):
        table.add_column(name, justify="right")
    for record in records:
        table.add_row(
            str(record["round"]),
            f"{record['rankings']} of {record['all_rankings']}",
            "" if record["agreement"]["value"] is None else as_number(record["agreement"]["value"]),
            f"{record['held_out_accuracy']:.3f}",
            as_number(record["reward"]),
            as_number(record["kl"]),
            *(
                "\n".join(column)
                for column in zip(
                    *(
                        (f"{against} {as_number(rate['mean'])}", by.replace("_", " "))
                        for by, rates in record["win_rates"].items()
                        for against, rate in rates.items()
                    ),
                    strict=True,
                )
            ),
        )
    return table
