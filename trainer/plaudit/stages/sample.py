"""Sample several answers of a policy to each prompt, for people to rank, to a file or to the ranking service.

Failure modes: a prompt from a held-out text; answers that change when an interrupted run continues. Prompts therefore
come from the training split and carry the hash of their source text, and each answer's random numbers depend only on
the seed, the prompt's index and the answer's index.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from pydantic import ValidationError
from rich.console import Console

from plaudit.data.prompts import Prompts, load_sourced_prompts
from plaudit.data.tables import DataError
from plaudit.errors import ConfigError
from plaudit.parallel.devices import device_named, settle_arithmetic
from plaudit.policy.checks import room_for_prompts
from plaudit.policy.generation import Draws
from plaudit.policy.writer import Writer, load_writer
from plaudit.run.progress import Counting
from plaudit.run.rankings import RankingAdmin, answers_in_pieces
from plaudit.run.storage import write_text, writing
from plaudit.settings.plain import comparable, to_dict
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.sample import SampleConfig
from plaudit.wire import rankings as wire

MAX_NAME_CHARS = 256
"""Maximum length of the policy's name in an answer."""
Sink = Callable[[Sequence[wire.AnswersRow]], None]
"""Receives completed rows, possibly more than once."""


@dataclass(frozen=True)
class SampleResult:
    """Statistics of a sampling run."""

    file: Path
    batch: str
    prompts: int
    generated: int
    """Number of prompts answered by this run; the others were already in the file."""
    merged_prompts: int
    """Number of texts skipped because an earlier one gave the same prompt."""
    same_answers: int
    """Number of duplicate answers within prompts; people see them once."""


def run(config: SampleConfig) -> SampleResult:
    """Answer every prompt that is not in the file yet. Rows go to the file, and to the service if one is given."""
    settle_arithmetic()
    if not config.to_service:
        return sample(config, lambda rows: None)
    with (
        Counting("answers uploaded") as counting,
        RankingAdmin(
            config.to,
            api_key_file=config.people.api_key_file,
            patience_s=config.people.patience_s,
            on_wait=counting.waiting,
        ) as admin,
    ):

        def upload(rows: Sequence[wire.AnswersRow]) -> None:
            for piece in answers_in_pieces(rows):
                admin.upload(upload_of(config, piece))

        # Before generation, so that a wrong key or address is reported at once and the batch exists.
        admin.upload(upload_of(config, []))
        return sample(config, upload)


def upload_of(config: SampleConfig, rows: Sequence[wire.AnswersRow]) -> wire.BatchUpload:
    """Rows in the ranking service's format."""
    return wire.BatchUpload(
        id=config.batch,
        round=config.round,
        purpose="train",
        overlap=config.people.overlap,
        overlap_share=config.people.overlap_share,
        instructions=config.people.instructions,
        rows=list(rows),
    )


def sample(config: SampleConfig, sink: Sink) -> SampleResult:
    """Write the rows of `config`; pass each to `sink` once it is in the file."""
    with writing(config.file):
        config.file.parent.mkdir(parents=True, exist_ok=True)
    with _alone_with(config.file):
        return _sample(config, sink)


def _sample(config: SampleConfig, sink: Sink) -> SampleResult:
    writer = load_writer(config.policy, device=device_named(config.device))
    prompts, groups, merged = training_prompts(config, writer)
    writer.check(prompts.token_ids, prompts.texts, config.generation)
    kept = _rows_in(config.file)
    settings = _settings_file(config, writer)
    for number, row in enumerate(kept[: config.n], start=1):
        _require_same(config, writer, number, row, prompts.texts[number - 1], groups[number - 1])
    write_text(*settings)
    if len(kept) > config.n:
        raise ConfigError(f"{config.file} holds {len(kept)} prompts and n={config.n}: ask for at least as many")
    sink(kept)
    same = sum(_same_answers(row) for row in kept)
    at_once = max(1, config.generation.batch_size // config.k)
    generation = config.generation.answering(config.prompts.kind)
    with Counting("prompts answered", len(prompts), len(kept)) as counting, _appending(config.file) as append:
        for start in range(len(kept), len(prompts), at_once):
            stop = min(start + at_once, len(prompts))
            first = config.skip + start
            texts = answers_to(writer, prompts.rows(start, stop), generation, config.k, config.seed, first=first)
            rows = [
                wire.new_answers_row(
                    config.batch,
                    prompts.texts[p],
                    [
                        wire.new_answer(
                            text,
                            policy=_name_of(config),
                            revision=writer.revision,
                            seed=number_of(config.seed, config.skip + p, j),
                        )
                        for j, text in enumerate(listed)
                    ],
                    group=groups[p],
                )
                for p, listed in zip(range(start, stop), texts, strict=True)
            ]
            append(rows)
            sink(rows)
            same += sum(map(_same_answers, rows))
            counting.add(len(rows))
    result = SampleResult(config.file, config.batch, len(prompts), len(prompts) - len(kept), merged, same)
    _say(config, result)
    return result


def training_prompts(config: SampleConfig, writer: Writer) -> tuple[Prompts, list[str], int]:
    """`n` distinct prompts of the training split after the first `skip`, their groups, and the number of texts with a
    repeated prompt.

    Raises:
        ConfigError: there are fewer than `n`.
    """
    room = room_for_prompts(writer.model, config.generation)
    found, sources = load_sourced_prompts(
        config.dataset, config.prompts, writer.tokenizer, "train", seed=config.seed, room=room
    )
    first: dict[str, int] = {}
    passed_over, wanted = 0, config.skip + config.n
    for i, text in enumerate(found.texts):
        if len(first) == wanted:
            break
        passed_over += text in first
        first.setdefault(text, i)
    if len(first) < wanted:
        after = f" after skip={config.skip}" if config.skip else ""
        raise ConfigError(
            f"n={config.n}{after} but data={config.dataset.data!r} has {len(first)} different prompts in its training "
            "split; ask for fewer, use longer prompts (--prompts.max-tokens) or a larger source"
        )
    chosen = list(first.values())[config.skip :]
    return found.select(chosen), [wire.group_of(sources[i]) for i in chosen], passed_over


@torch.no_grad()
def answers_to(
    writer: Writer, prompts: Prompts, settings: GenerationSettings, k: int, seed: int, *, first: int = 0
) -> list[list[str]]:
    """`k` answers to each prompt, generated in one batch. `first` is the index of the first prompt."""
    places = [(first + p, j) for p in range(len(prompts)) for j in range(k)]
    drawn = [Draws.of(settings, 1, seed=seed, step=p * wire.MAX_ANSWERS + j) for p, j in places]
    draws = Draws(torch.cat([draw.lengths for draw in drawn]), torch.cat([draw.uniforms for draw in drawn]))
    queries = [prompts.token_ids[p - first] for p, _ in places]
    texts = writer.answer(queries, draws, settings)
    return [texts[start : start + k] for start in range(0, len(texts), k)]


def number_of(seed: int, prompt: int, answer: int) -> int:
    """The seed recorded with an answer, derived from the run's seed and the answer's index."""
    return (seed << 32) + prompt * wire.MAX_ANSWERS + answer


def _name_of(config: SampleConfig) -> str:
    """The policy's name as recorded with answers; long paths are cut to their end."""
    return config.policy[-MAX_NAME_CHARS:]


def _same_answers(row: wire.AnswersRow) -> int:
    return len(row.answers) - len({answer.text for answer in row.answers})


def _rows_in(file: Path) -> list[wire.AnswersRow]:
    """The existing rows. An incomplete last line is removed from the file.

    Raises:
        DataError: a line before the last one is not a row of answers.
    """
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with writing(file), file.open("r+b") as opened:
            opened.truncate(len(whole))
            opened.flush()
            os.fsync(opened.fileno())
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(wire.AnswersRow.model_validate_json(line))
        except ValidationError as error:
            reason = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise DataError(f"{file}, line {number}: no row of answers ({reason}); name another file") from None
    return rows


def _require_same(
    config: SampleConfig, writer: Writer, number: int, row: wire.AnswersRow, prompt: str, group: str
) -> None:
    """Raises `ConfigError` for an existing row that this run would not have written."""
    seeds = [number_of(config.seed, config.skip + number - 1, j) for j in range(config.k)]
    for name, found, expected in (
        ("batch", row.batch, config.batch),
        ("number of answers", len(row.answers), config.k),
        ("prompt", row.prompt, prompt),
        ("group", row.group, group),
        ("policy", row.answers[0].policy, _name_of(config)),
        ("revision of the policy", row.answers[0].revision, writer.revision),
        ("seed", [answer.seed for answer in row.answers], seeds),
    ):
        if found != expected:
            raise ConfigError(
                f"{config.file}, line {number}: another {name} than this run's ({found!r:.60}, not {expected!r:.60}); "
                "go on with the settings of then, or name another file"
            )


def _settings_file(config: SampleConfig, writer: Writer) -> tuple[Path, str]:
    """The path of the recorded settings, and the settings. Raises `ConfigError` if others are recorded."""
    path = config.file.with_name(f"{config.file.name}.settings.json")
    fixed = to_dict(config)
    for free in ("to", "output_dir", "n", "device", "people", "round"):
        fixed.pop(free)
    fixed |= {"revision": writer.revision, "batch": config.batch}
    generation = fixed["generation"]
    assert isinstance(generation, dict)
    # Answers don't depend on these.
    fixed["generation"] = {name: v for name, v in generation.items() if name not in ("batch_size", "static_cache")}
    if path.is_file() and config.file.is_file() and config.file.stat().st_size:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        # A setting added after the file was written had its default.
        default = comparable(to_dict(SampleConfig()))
        then, now = default | comparable(recorded), default | comparable(fixed)
        for name, value in now.items():
            if then.get(name) != value:
                raise ConfigError(
                    f"{config.file} was begun with {name}={then.get(name)!r:.120}, and now it is {value!r:.120}; "
                    "go on with the settings of then, or name another file"
                )
    return path, json.dumps(fixed, indent=2) + "\n"


@contextmanager
def _alone_with(file: Path) -> Iterator[None]:
    """Lock the file for one run. The operating system releases the lock when the process dies. Raises `ConfigError`."""
    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"))
    with writing(file):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(f"{file} is being written by another run; wait for it or name another file") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _appending(path: Path) -> Iterator[Sink]:
    """Append rows to a file and flush them to disk."""
    with writing(path):
        file = path.open("a", encoding="utf-8", newline="")

    def append(rows: Sequence[wire.AnswersRow]) -> None:
        with writing(path):
            file.writelines(row.model_dump_json() + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    with file:
        yield append


def _say(config: SampleConfig, result: SampleResult) -> None:
    where = f"{config.to} as batch {result.batch}" if config.to_service else str(result.file)
    Console().print(
        f"{result.prompts} prompts with {config.k} answers each are in {where}: {result.generated} answered now, "
        f"{result.merged_prompts} texts merged because their prompt was there, {result.same_answers} answers repeat "
        "another one to their prompt",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
