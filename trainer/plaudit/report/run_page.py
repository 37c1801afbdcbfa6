"""The pages of one run and of several beside each other: each one HTML file that needs nothing else.

Failure modes: a response that the browser runs instead of showing it; a page that loads something from elsewhere. Every
text is escaped by the template, or is JSON that the page's script shows as text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from plaudit.report.changes import paragraph
from plaudit.report.page import COLOURS, as_number, grouped, templates
from plaudit.report.panels import PALETTE, groups_of, groups_of_runs
from plaudit.report.run_data import RunData
from plaudit.run.evaluations import PREFIX
from plaudit.run.metrics import KL, REWARD_MEAN
from plaudit.settings.plain import comparable

MOST_ROWS = 1_500
"""Samples in a page."""
MOST_CHARS = 2_000
"""Of one text in a page."""
FOOTER = (
    "Rewards and scores are as the reward service and the judges gave them. KL is estimated from the sampled "
    "responses. Intervals are 95 % percentile bootstrap intervals of the mean over prompts."
)


def render_run(run: RunData) -> str:
    """The page of one run, finished or not."""
    total = run.settings.get("steps")
    done = run.metrics[-1]["step"] + 1 if run.metrics else 0
    of = f" of {total}" if total and total != done else ""
    subtitle = f"{done}{of} PPO steps."
    if run.ended_early is not None:
        subtitle += f" The run ended early: {run.ended_early}."
    return _page(
        title=f"{run.name}: training",
        subtitle=subtitle,
        cards=_cards(run),
        heading="What went up and what went down",
        sentences=paragraph(run),
        groups=groups_of(run),
        samples=samples_of(run),
        settings={"Settings": grouped(run.settings)} if run.settings else {},
    )


def render_runs(runs: Sequence[RunData]) -> str:
    """The page of several runs."""
    same = same_prompts(runs)
    sentences = [
        f"{len(runs)} runs, each in its colour. A difference between two runs with overlapping intervals may be chance."
    ]
    if len({json.dumps(run.settings.get("reward", {}).get("components"), sort_keys=True) for run in runs}) > 1:
        sentences.append("The runs were rewarded by different services, so their rewards may have different scales.")
    return _page(
        title="Runs beside each other",
        subtitle=", ".join(run.name for run in runs),
        heading="The runs",
        sentences=sentences,
        table=_figures_table(runs),
        groups=groups_of_runs(runs),
        samples=samples_of_runs(runs) if same else None,
        settings={"Settings that differ": {"": different_settings(runs)}},
    )


def _page(*, cards: Sequence[Mapping[str, str]] = (), table: Mapping[str, Any] | None = None, **values: Any) -> str:
    template = templates().get_template("run.html.j2")
    return template.render(cards=cards, table=table, colours=COLOURS, footer=FOOTER, **values)


def _cards(run: RunData) -> list[dict[str, str]]:
    if not run.evaluations:
        if not run.metrics:
            return []
        last = run.metrics[-1]
        shown = [
            ("Mean reward", REWARD_MEAN),
            ("KL to the reference", KL),
            ("Response length", "tokens/responses_len_mean"),
        ]
        return [
            {"name": name, "figure": as_number(last[metric]), "note": "last training step"}
            for name, metric in shown
            if metric in last
        ]
    last, best = run.evaluations[-1], run.best
    cards = [
        _card("Held-out reward", last, "reward"),
        _card("Win rate against the reference", last, "win_rate"),
        _card("KL to the reference", last, "kl"),
        *(_card(f"Score of {name}", last, f"{name}/reward") for name in run.judges),
    ]
    if best is not None:
        name = run.watch.best_by
        note = f"{name} {as_number(best[PREFIX + name])}, kept in best/"
        cards.append({"name": "Best evaluation", "figure": f"step {best['step']}", "note": note})
    return cards


def _card(name: str, record: Mapping[str, float], figure: str) -> dict[str, str]:
    value, low, high = (record[f"{PREFIX}{figure}{end}"] for end in ("", "_low", "_high"))
    return {"name": name, "figure": as_number(value), "note": f"95 %: {as_number(low)} to {as_number(high)}"}


def samples_of(run: RunData) -> dict[str, Any] | None:
    """The table of samples: held-out answers at each evaluation, else the rollouts; None if there are neither."""
    if run.answers:
        judges = run.judges
        columns = ["step", "row", "prompt", "response", "reward", *judges, "KL", "length", "finish"]
        each = max(1, MOST_ROWS // len(run.answers))
        rows = [
            [step, row["row"], row["prompt"], row["response"], row["reward"]]
            + [row["judges"].get(name) for name in judges]
            + [row["kl"], row["length"], row["finish_reason"]]
            for step, answers in sorted(run.answers.items())
            for row in answers[:each]
        ]
        kept = min(each, max(map(len, run.answers.values())))
        note = f"The first {kept} held-out prompts at each evaluation, not selected, with the same random numbers."
    elif run.rollouts:
        columns = ["step", "row", "prompt", "response", "reward", "KL", "advantage", "length", "finish"]
        every = -(-len(run.rollouts) // MOST_ROWS)
        names = ("step", "row", "prompt", "response", "reward", "kl", "advantage", "length", "finish_reason")
        rows = [[row[name] for name in names] for row in run.rollouts[::every]]
        note = f"{len(rows)} rollouts at even distances. RUN/rollouts has all that were kept."
    else:
        return None
    return _samples(columns, rows, note, "Step")


def samples_of_runs(runs: Sequence[RunData]) -> dict[str, Any]:
    """The newest held-out answers of runs that have the same held-out prompts."""
    each = max(1, MOST_ROWS // len(runs))
    rows = []
    for run in runs:
        step = max(run.answers)
        rows += [
            [run.name, step, row["row"], row["prompt"], row["response"], row["reward"], row["kl"], row["length"]]
            for row in run.answers[step][:each]
        ]
    columns = ["run", "step", "row", "prompt", "response", "reward", "KL", "length"]
    return _samples(
        columns,
        rows,
        "The newest answers of each run to the same held-out prompts. Sort by row to see them beside each other.",
        "Run",
    )


def same_prompts(runs: Sequence[RunData]) -> bool:
    """Whether all runs have held-out answers to the same prompts."""
    return len(
        {tuple(row["prompt"] for row in run.answers[max(run.answers)]) if run.answers else () for run in runs}
    ) == 1 and all(run.answers for run in runs)


def _samples(columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str, pick: str) -> dict[str, Any]:
    kinds = {"prompt": "text", "response": "text", "run": "label", "finish": "label"}
    table = {
        "columns": [{"name": name, "kind": kinds.get(name, "number")} for name in columns],
        "rows": [[_shortened(value) for value in row] for row in rows],
    }
    return {"note": note, "pick": pick, "json": script_json(table)}


def script_json(value: Any) -> str:
    """JSON for a `script` element. No text in it can end the element or open a comment: every < is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shortened(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return f"{value[:MOST_CHARS]} …" if isinstance(value, str) and len(value) > MOST_CHARS else value


def _figures_table(runs: Sequence[RunData]) -> dict[str, Any]:
    judges = list(dict.fromkeys(name for run in runs for name in run.judges))
    figures = ["reward", "win_rate", "kl", "length", *(f"{name}/reward" for name in judges)]
    rows = []
    for i, run in enumerate(runs):
        steps = run.metrics[-1]["step"] + 1 if run.metrics else 0
        cells = [run.name, str(steps)]
        if run.evaluations:
            cells += [_cell(run.evaluations[-1], name) for name in figures]
            cells.append("" if run.best is None else f"{run.best['step']}")
        else:
            last = run.metrics[-1] if run.metrics else {}
            known = {"reward": REWARD_MEAN, "kl": KL, "length": "tokens/responses_len_mean"}
            cells += [as_number(last[known[name]]) if known.get(name) in last else "" for name in figures]
            cells.append("")
        rows.append({"cells": cells, "colour": PALETTE[i % len(PALETTE)]})
    names = ["reward", "win rate", "KL, nats", "length", *(f"score of {name}" for name in judges)]
    note = "Of the newest evaluation, with 95 % intervals. Of a run without evaluations: of its last training step."
    return {"title": "Figures", "note": note, "head": ["run", "steps", *names, "best step"], "rows": rows}


def _cell(record: Mapping[str, float], figure: str) -> str:
    if PREFIX + figure not in record:
        return ""
    value, low, high = (record[f"{PREFIX}{figure}{end}"] for end in ("", "_low", "_high"))
    return f"{as_number(value)} ({as_number(low)} to {as_number(high)})"


def different_settings(runs: Sequence[RunData]) -> dict[str, str]:
    """The settings that are not the same in all runs, by dotted name: the value of each run in order."""
    flat = [comparable(run.settings) for run in runs]
    names = sorted({name for settings in flat for name in settings} - {"output_dir", "resume"})
    missing = "(not set)"
    return {
        name: " | ".join(str(settings.get(name, missing)) for settings in flat)
        for name in names
        if len({str(settings.get(name, missing)) for settings in flat}) > 1
    }
