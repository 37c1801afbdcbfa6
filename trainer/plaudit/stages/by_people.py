"""Evaluation by people: a blind comparison of the answers before and after training on held-out prompts.

Failure modes: results of a partial evaluation are reported as complete; answers are generated again, and differ, when
the command continues. Answers are therefore saved before people are asked.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.writer import revision_of
from plaudit.report.comparison import Judgement, WinRate, comparisons, win_rate
from plaudit.run.people import wait_for_people
from plaudit.run.progress import Counting
from plaudit.run.rankings import RankingAdmin, RankingsRejected, answers_in_pieces
from plaudit.run.storage import replaced_files
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.plain import to_dict
from plaudit.wire import rankings as wire

ANSWERS_FILE = "people-answers.jsonl"
SETTINGS_FILE = "people-settings.json"
RANKINGS_FILE = "people-rankings.jsonl"
FIGURES_FILE = "people.json"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class BothAnswers:
    """A held-out prompt, its source text, and both policies' answers."""

    prompt: str
    source: str
    before: str
    after: str


@dataclass(frozen=True)
class PeopleResult:
    """The content of people.json."""

    batch: str
    prompts: int
    """Number of prompts in the evaluation."""
    identical: int
    """Prompts with identical answers, which count as ties without asking people."""
    unjudged: int
    """Prompts without a ranking (skipped, flagged, or the batch was closed); they are left out."""
    rankings: int
    annotators: int
    win_rate: WinRate
    """The policy after training against the one before."""
    tied_rankings: float
    """Share of the rankings that tie both answers."""
    agreement: dict[str, Any]
    """The ranking service's agreement statistics, over prompts ranked by several people."""


def run(config: EvaluateConfig, answer: Callable[[], list[BothAnswers]]) -> PeopleResult:
    """Upload the tasks, wait for people, and report how often the trained policy wins.

    `answer` is called unless an earlier run has saved the answers in the output directory.

    Raises:
        RankingsUnavailable: people have not finished in time. The same command continues.
    """
    assert config.by_people is not None
    rows = _rows(config, answer)
    with (
        Counting("rankings") as counting,
        RankingAdmin(
            config.by_people,
            api_key_file=config.people.api_key_file,
            patience_s=config.people.patience_s,
            on_wait=counting.waiting,
        ) as admin,
    ):
        for piece in answers_in_pieces(rows):
            _upload(admin, config, piece)
        wait_for_people(
            admin, rows[0].batch, counting, patience_s=config.people_patience_s, poll_s=config.people_poll_s
        )
        rankings = admin.rankings(rows[0].batch)
        agreement = admin.agreement(rows[0].batch)
    result = judge(rows, rankings, agreement)
    directory = config.output_dir
    write_figures(directory, rankings, result)
    _say(result, directory)
    return result


def judge(
    rows: Sequence[wire.AnswersRow], rankings: Sequence[wire.RankingRow], agreement: wire.AgreementReport
) -> PeopleResult:
    """The results of an evaluation.

    Raises:
        RankingsRejected: there are no rankings.
    """
    known = {row.id for row in rows}
    # Surplus rankings count like any other: the intervals are over prompts.
    said = [row for row in rankings if row.status in ("counted", "surplus") and row.task in known]
    if all(row.answers[0].text == row.answers[1].text for row in rows):
        raise RankingsRejected(
            f"before and after gave the same answer to each of the {len(rows)} prompts: there is nothing to compare; "
            "are both the same policy?"
        )
    if not said:
        raise RankingsRejected(
            f"batch {rows[0].batch!r} is over and nobody has ranked anything in it: there is no figure"
        )
    judgements = [Judgement(_prompt(row), tuple(a.policy for a in row.answers), tuple(row.ranks)) for row in said]
    identical = [row for row in rows if row.answers[0].text == row.answers[1].text]
    judgements += [Judgement(_prompt(row), (BEFORE, AFTER), (1, 1)) for row in identical]
    judged = {row.task for row in said} | {row.id for row in identical}
    return PeopleResult(
        batch=rows[0].batch,
        prompts=len(rows),
        identical=len(identical),
        unjudged=len(known - judged),
        rankings=len(said),
        annotators=len({row.annotator for row in said}),
        win_rate=win_rate(comparisons(judgements), AFTER, BEFORE),
        tied_rankings=sum(row.ranks[0] == row.ranks[1] for row in said) / len(said),
        agreement=agreement.model_dump(exclude={"annotators", "batch"}),
    )


def _prompt(row: wire.AnswersRow | wire.RankingRow) -> str:
    """The unit of the bootstrap; two texts may have the same opening."""
    return wire.content_hash(wire.as_json(row.prompt))


def _rows(config: EvaluateConfig, answer: Callable[[], list[BothAnswers]]) -> list[wire.AnswersRow]:
    """The tasks for people: those of an earlier run with the same settings, or new ones, which are saved."""
    directory = config.output_dir
    answers_file, settings_file = directory / ANSWERS_FILE, directory / SETTINGS_FILE
    settings = _settings(config)
    if settings_file.is_file() and answers_file.is_file():
        recorded = json.loads(settings_file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if recorded.get(name) != value:
                raise ConfigError(
                    f"output_dir={directory} holds another evaluation by people, with "
                    f"{name}={recorded.get(name)!r:.120} and not {value!r:.120}; give another --output-dir"
                )
        return wire.rows_of(answers_file.read_text(encoding="utf-8"), wire.AnswersRow)
    both = answer()
    batch = config.people.batch or f"evaluation-{wire.content_hash([dataclasses.astuple(row) for row in both])[:12]}"
    before, after = _revisions(config)
    rows = {}
    for row in both:
        answers = [
            wire.new_answer(row.before, policy=BEFORE, revision=before, seed=config.seed),
            wire.new_answer(row.after, policy=AFTER, revision=after, seed=config.seed),
        ]
        made = wire.new_answers_row(batch, row.prompt, answers, group=wire.group_of(row.source), split="held_out")
        rows[made.id] = made
    write_answers(directory, list(rows.values()), settings)
    return list(rows.values())


def write_answers(directory: Path, rows: Sequence[wire.AnswersRow], settings: Mapping[str, Any]) -> None:
    """Write the tasks and the settings that they depend on, atomically. Raises `NotWritten`."""
    with replaced_files(directory, "people-answers", last=SETTINGS_FILE) as beside:
        (beside / ANSWERS_FILE).write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
        (beside / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_figures(directory: Path, rankings: Sequence[wire.RankingRow], result: PeopleResult) -> None:
    """Write the rankings and the results, atomically. Raises `NotWritten`."""
    figures = json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False)
    with replaced_files(directory, "people", last=FIGURES_FILE) as beside:
        lines = "".join(row.model_dump_json() + "\n" for row in rankings)
        (beside / RANKINGS_FILE).write_text(lines, encoding="utf-8")
        (beside / FIGURES_FILE).write_text(figures + "\n", encoding="utf-8")


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that the answers depend on."""
    settings = to_dict(config)
    for free in ("output_dir", "reward", "by_people", "people_patience_s", "people_poll_s", "device"):
        settings.pop(free)
    generation, people = settings.pop("generation"), settings.pop("people")
    assert isinstance(generation, dict)
    assert isinstance(people, dict)
    kept = {name: value for name, value in generation.items() if name not in ("batch_size", "static_cache")}
    return {**settings, "generation": kept, "batch": people["batch"], "revisions": list(_revisions(config))}


def _revisions(config: EvaluateConfig) -> tuple[str, str]:
    """Hashes of the weights before and after, if they are local directories."""
    before, after = (
        Path(demo_models.resolve(name)) if name is not None else None for name in (config.policy, config.after)
    )
    return tuple(revision_of(path) if path is not None and path.is_dir() else "" for path in (before, after))  # type: ignore[return-value]


def _upload(admin: RankingAdmin, config: EvaluateConfig, rows: list[wire.AnswersRow]) -> None:
    try:
        admin.upload(
            wire.BatchUpload(
                id=rows[0].batch,
                purpose="evaluation",
                overlap=config.people.overlap,
                overlap_share=config.people.overlap_share,
                instructions=config.people.instructions,
                rows=rows,
            )
        )
    except RankingsRejected:
        # A closed batch accepts no rows and needs none.
        if admin.progress(rows[0].batch).closed_at is None:
            raise


def _say(result: PeopleResult, directory: Path) -> None:
    rate, pairs = result.win_rate, result.agreement["pair_agreement"]
    table = Table(title=f"{result.prompts} held-out prompts, judged by {result.annotators} people")
    table.add_column("")
    table.add_column("after against before", justify="right")
    table.add_row("win rate, ties 1/2 (95 % interval)", f"{rate.mean:.3f} ({rate.ci95[0]:.3f} to {rate.ci95[1]:.3f})")
    table.add_row("wins, ties, losses", f"{rate.wins:.3f}, {rate.ties:.3f}, {rate.losses:.3f}")
    table.add_row("rankings, of them ties", f"{result.rankings}, {result.tied_rankings:.3f}")
    table.add_row("the same answer twice (a tie), not judged", f"{result.identical}, {result.unjudged}")
    if pairs["value"] is None:
        table.add_row("agreement", "no prompt was ranked by two people")
    else:
        chance = result.agreement["chance"]
        table.add_row(
            "agreement (95 % interval), by chance",
            f"{pairs['value']:.3f} ({pairs['low']:.3f} to {pairs['high']:.3f}), {chance:.3f}",
        )
    console = Console()
    console.print(table)
    console.print(f"figures: {directory / FIGURES_FILE}", markup=False, soft_wrap=True)
