"""Texts, labels and prompts, from the hub, a package or a local file.

What would be wrong here: a text that one stage trains on and another is judged by. The split therefore depends on the
text alone (a hash of it), so every stage, every source order and every copy of a text agrees about its side.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from plaudit.data.tables import DataError, Table, load_table
from plaudit.errors import ConfigError
from plaudit.policy.texts import cut_between_characters, prompt_texts, tokens_in_front
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.data import DataSettings, PromptSettings

Split = Literal["train", "held_out"]
Label = int | str | bool | float


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one label each, in a shuffled order that depends on nothing but the texts."""

    texts: list[str]
    labels: list[Label]
    class_names: tuple[str, ...] | None = None
    """What the source itself calls the labels 0, 1, ..., if it says so."""


@dataclass(frozen=True)
class Prompts:
    """Openings of texts: `token_ids[i]` is what the policy sees, `texts[i]` what the reward service sees."""

    token_ids: list[list[int]]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> "Prompts":
        """Some consecutive prompts."""
        return Prompts(self.token_ids[start:stop], self.texts[start:stop])


class PromptSchedule:
    """Which prompts each step takes: a new permutation every epoch, from seed and epoch alone."""

    def __init__(self, prompts: Prompts, batch_size: int, *, seed: int) -> None:
        self.steps_per_epoch = len(prompts) // batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(f"{len(prompts)} prompts are fewer than one batch of ppo.batch_size={batch_size}")
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, torch.Tensor] | None = None

    def batch(self, step: int) -> Prompts:
        """The prompts of step `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._prompts), generator=generator)
        start = position * self._batch_size
        chosen = self._order[1][start : start + self._batch_size].tolist()
        return Prompts([self._prompts.token_ids[i] for i in chosen], [self._prompts.texts[i] for i in chosen])


def load_texts(settings: DataSettings, split: Split) -> list[str]:
    """The texts of one split, shuffled reproducibly.

    Raises:
        DataError: the source cannot be read, lacks the text column, or has something else than a text in it.
    """
    texts, _ = _columns(load_table(settings.data), settings)
    return [texts[i] for i in _chosen(texts, settings, split)]


def load_labelled_texts(settings: DataSettings, split: Split) -> LabelledTexts:
    """Texts and labels of one split, in the same order as `load_texts`.

    Raises:
        DataError: the source cannot be read, lacks one of the columns, or has something else in them.
    """
    table = load_table(settings.data)
    texts, labels = _columns(table, settings, settings.label_column)
    chosen = _chosen(texts, settings, split)
    return LabelledTexts(
        [texts[i] for i in chosen], [labels[i] for i in chosen], table.class_names.get(settings.label_column)
    )


def load_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
) -> Prompts:
    """The first tokens of every text that is long enough; how many is drawn for each text from `seed`.

    In front of them stands what the tokenizer itself puts in front of a text (a begin-of-text token, if it has one).
    No prompt ends inside a character: it then has a token less, or as many more as the character needs.

    Raises:
        DataError: the source cannot be read, or no text is long enough.
    """
    return load_sourced_prompts(settings, prompts, tokenizer, split, seed=seed, limit=limit)[0]


def load_sourced_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
) -> tuple[Prompts, list[str]]:
    """`load_prompts`, and the text that each prompt is the opening of.

    Raises:
        DataError: as `load_prompts` does.
    """
    texts = [text for text in load_texts(settings, split) if len(text) > prompts.min_text_chars]
    if not texts:
        raise DataError(
            f"no text in data={settings.data!r} is longer than min_text_chars={prompts.min_text_chars} characters; "
            "lower prompts.min_text_chars or name another source"
        )
    texts = texts[:limit]
    draw = random.Random(seed)
    # Tokenising the whole of a text for its opening is waste: English has about 4 characters a token.
    openings = tokenizer([text[: 16 * prompts.max_tokens] for text in texts], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    lengths = [draw.randint(prompts.min_tokens, prompts.max_tokens) for _ in openings]
    in_front = tokens_in_front(tokenizer)
    token_ids = [
        [*in_front, *ids]
        for ids in cut_between_characters(tokenizer, openings, texts, lengths, at_least=prompts.min_tokens)
    ]
    return Prompts(token_ids, prompt_texts(tokenizer, token_ids)), texts


def fingerprint(rows: Iterable[Any]) -> str:
    """How many rows these are, and a hash of them in their order; equal for equal data on any machine."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        count += 1
    return f"{count} rows, sha256 {digest.hexdigest()[:16]}"


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out split: a hash of it, read as a number in [0, 1), is below `fraction`."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def shuffled_place(text: str) -> bytes:
    """What a split is sorted by: a hash of the text."""
    return hashlib.sha256(b"order" + text.encode("utf-8", "surrogatepass")).digest()


def _chosen(texts: Sequence[str], settings: DataSettings, split: Split) -> list[int]:
    wanted = split == "held_out"
    chosen = [i for i, text in enumerate(texts) if is_held_out(text, settings.held_out_fraction) is wanted]
    # By hash, not by position: two files with the same texts in another order give the same order here.
    chosen.sort(key=lambda i: shuffled_place(texts[i]))
    if not chosen:
        raise DataError(
            f"data={settings.data!r} has {len(texts)} texts and none of them falls into the {split} split "
            f"(held_out_fraction={settings.held_out_fraction}); use more texts or another fraction"
        )
    return chosen[: settings.max_texts] if split == "train" else chosen


def _columns(table: Table, settings: DataSettings, *others: str) -> tuple[list[str], list[Any]]:
    """The texts, and the values of the other column if there is one. Rows without either are left out, and said."""
    for name in (settings.text_column, *others):
        if name not in table.columns:
            joined = any(mark in only for only in table.columns if len(table.columns) == 1 for mark in ";\t|")
            raise DataError(
                f"data={settings.data!r} has no column {name!r}; it has: {', '.join(table.columns) or 'none at all'}. "
                + (
                    "Its values must be separated by commas"
                    if joined
                    else "Name it with --text-column or --label-column"
                )
            )
    texts = table.columns[settings.text_column]
    for number, text in enumerate(texts, start=1):
        where = f"data={settings.data!r}, row {number}, column {settings.text_column!r}"
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {text!r:.60} is {_kind(text)} and no text; write it as a string, or remove the row"
            )
        _require_characters(text, where)
    beside = table.columns[others[0]] if others else texts
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    gone = set(empty)
    _say_dropped(settings, empty, "no text in the row")
    if others:
        for number, value in enumerate(beside, start=1):
            if value is not None and not isinstance(value, str | int | float):
                raise DataError(
                    f"data={settings.data!r}, row {number}, column {others[0]!r}: {value!r:.60} is {_kind(value)} and "
                    "no label; give one word or number for each text"
                )
        unlabelled = [i for i, value in enumerate(beside) if i not in gone and (value is None or value == "")]
        gone |= set(unlabelled)
        _say_dropped(settings, unlabelled, f"nothing in column {others[0]!r}")
    kept = [i for i in range(len(texts)) if i not in gone]
    return [texts[i] for i in kept], [beside[i] for i in kept]


def _kind(value: Any) -> str:
    return "a missing value" if value is None else f"of type {type(value).__name__}"


def _require_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text!r:.60} holds half a character (a lone surrogate); remove it") from None


_SAID: set[str] = set()


def _say_dropped(settings: DataSettings, rows: Sequence[int], why: str) -> None:
    if rows:
        line = f"data={settings.data!r}: left out {len(rows)} with {why}; the first is row {rows[0] + 1}"
        if line not in _SAID:  # a stage asks for both splits
            print(line, file=sys.stderr, flush=True)
            _SAID.add(line)
