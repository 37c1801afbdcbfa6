"""Evaluate a reward model, wherever it is served, on preferences: accuracy, calibration, length bias.

Failure modes: metrics over only the prompts that were scored before an outage, or over training prompts.
"""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from plaudit.data.preferences import LeftOut, RankedPrompt, load_opinions, merged, split
from plaudit.data.sources import shuffled_place
from plaudit.errors import ConfigError
from plaudit.report.preferences import Interval, LengthBias, RankingFigures, length_bias, ranking_figures
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.run.progress import Counting
from plaudit.run.runtime import exclusive
from plaudit.run.storage import write_text
from plaudit.settings.evaluate_judge import JudgeConfig
from plaudit.settings.plain import to_dict

FIGURES_FILE = "judge.json"
SCORES_FILE = "judge-scores.jsonl"
PROMPTS_AT_ONCE = 64
"""Prompts whose answers are submitted together. As many again are in flight meanwhile."""


@dataclass(frozen=True)
class JudgeResult:
    """The content of judge.json, besides the settings."""

    revision: str
    """The reward model's revision, as reported by its service."""
    figures: RankingFigures
    length: LengthBias


def run(config: JudgeConfig) -> JudgeResult:
    """Score every answer and compare with people's preferences; write judge.json and judge-scores.jsonl, print a table.

    Raises:
        ConfigError: there are no preferences, or no reward endpoint.
        RewardUnavailable, RewardRejected: from the reward service.
    """
    if not config.preferences:
        raise ConfigError("preferences is missing: name a file of preferences with --preferences")
    left_out = LeftOut()
    rows = preferences_of(config, left_out)
    for line in left_out.lines():
        print(f"preferences={config.preferences}: {line}")
    # Checked before the first score, because results that can't be written would be lost.
    with exclusive(config.output_dir):
        revision, scores = _scores(config, rows)
        result = JudgeResult(
            revision, ranking_figures(rows, scores, scale=config.score_scale), length_bias(rows, scores)
        )
        lines = [
            {
                "prompt": row.prompt,
                "answers": row.answers,
                "scores": given,
                "pairs": [dataclasses.asdict(p) for p in row.pairs],
            }
            for row, given in zip(rows, scores, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        write_text(config.output_dir / SCORES_FILE, text)
        # Written last: if it exists, so do the other files.
        figures = {**dataclasses.asdict(result), "left_out": left_out.counts, "config": to_dict(config)}
        write_text(config.output_dir / FIGURES_FILE, json.dumps(figures, indent=2, allow_nan=False) + "\n")
    _say(config, result)
    return result


def preferences_of(config: JudgeConfig, left_out: LeftOut) -> list[RankedPrompt]:
    """The prompts, in an order that depends only on their texts. Raises `ConfigError` if there are none."""
    rows = merged(load_opinions(config.preferences, left_out), left_out)
    if config.split == "held_out":
        rows = split(rows, config.held_out_fraction, LeftOut())[1]
    if not rows:
        raise ConfigError(
            f"preferences={config.preferences!r} holds no prompt with two answers that somebody tells apart"
            + (f" in the held-out split at held_out_fraction={config.held_out_fraction}" * (config.split == "held_out"))
        )
    rows.sort(key=lambda row: shuffled_place(json.dumps([row.prompt, row.group])))
    return rows[: config.limit]


def _scores(config: JudgeConfig, rows: Sequence[RankedPrompt]) -> tuple[str, list[list[float]]]:
    """The reward model's revision, and the scores of every row's answers."""
    scores: list[list[float]] = []
    pending: list[tuple[Sequence[RankedPrompt], Future[list[float]]]] = []

    def take() -> None:
        asked, future = pending.pop(0)
        found = iter(future.result())
        scores.extend([next(found) for _ in row.answers] for row in asked)
        counting.add(len(asked))

    with (
        Counting("prompts judged", len(rows)) as counting,
        RewardClient(config.reward, on_wait=counting.waiting) as client,
    ):
        try:
            client.connect()
            for start in range(0, len(rows), PROMPTS_AT_ONCE):
                part = rows[start : start + PROMPTS_AT_ONCE]
                # The reward client decides whether a conversation can be sent.
                prompts = [cast("Any", row.prompt) for row in part for _ in row.answers]
                pending.append((part, client.submit(prompts, [answer for row in part for answer in row.answers])))
                if len(pending) > 1:
                    take()
            while pending:
                take()
        except RewardRejected as error:
            error.leave_in(config.output_dir)
            raise
        return client.revision, scores


def _say(config: JudgeConfig, result: JudgeResult) -> None:
    figures, length = result.figures, result.length
    table = Table(title=f"{figures.pairs} pairs of {figures.prompts} prompts, judged by {result.revision}")
    table.add_column("")
    table.add_column("(95 % interval)", justify="right")
    table.add_row("accuracy", _with_interval(figures.accuracy, figures.accuracy_ci95))
    agreement = "nobody shares a pair" if figures.agreement is None else f"{figures.agreement:.3f}"
    possible = "" if figures.ceiling is None else f", so possible: {figures.ceiling:.3f}"
    table.add_row("people's agreement", agreement + possible)
    table.add_row("calibration error", _with_interval(figures.calibration_error, figures.calibration_ci95))
    for part in figures.bins:
        sure = f"  where it is {part.confidence:.2f} sure ({100 * part.share:.0f} % of pairs)"
        table.add_row(sure, f"{part.accuracy:.3f} right")
    table.add_row(
        "accuracy where the better is longer", _of(length.accuracy_where_longer, length.accuracy_where_longer_ci95)
    )
    table.add_row(
        "accuracy where it is shorter", _of(length.accuracy_where_shorter, length.accuracy_where_shorter_ci95)
    )
    table.add_row("the better is the longer one", _of(length.better_is_longer, None))
    table.add_row("correlation of score and length", _of(length.correlation, length.correlation_ci95))
    console = Console()
    console.print(table)
    if figures.at_chance:
        console.print("it can't be told from guessing", markup=False)
    console.print(f"figures: {config.output_dir / FIGURES_FILE}", markup=False, soft_wrap=True)


def _with_interval(value: float, interval: Interval) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _of(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "no such pair"
    return f"{value:.3f}" if interval is None else _with_interval(value, interval)
