"""Texts and labels, from the hub, a package or a local file, and which split each row is in.

What would be wrong here: a text that one stage trains on and another is judged by. The split therefore depends on the
text alone (a hash of it), so every stage, every source order and every copy of a text agrees about its side.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plaudit.data.tables import DataError, Table, kind_of, load_table, require_characters
from plaudit.settings.data import DataSettings

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
class Rows:
    """The rows of one split, in an order that depends on nothing but their keys."""

    table: Table
    indices: list[int]
    """Where they are in the table."""
    keys: list[str]
    """The text of each that decides about its split and place."""

    def column(self, name: str) -> list[Any]:
        """Their values in a column."""
        values = self.table.columns[name]
        return [values[i] for i in self.indices]


def load_texts(settings: DataSettings, split: Split) -> list[str]:
    """The texts of one split, shuffled reproducibly.

    Raises:
        DataError: the source cannot be read, lacks the text column, or has something else than a text in it.
    """
    return rows_of_split(settings, split, lambda table: text_rows(table, settings, settings.text_column)).keys


def load_labelled_texts(settings: DataSettings, split: Split) -> LabelledTexts:
    """Texts and labels of one split, in the same order as `load_texts`.

    Raises:
        DataError: the source cannot be read, lacks one of the columns, or has something else in them.
    """
    name = settings.label_column
    rows = rows_of_split(settings, split, lambda table: _labelled_rows(table, settings))
    return LabelledTexts(rows.keys, rows.column(name), rows.table.class_names.get(name))


def rows_of_split(settings: DataSettings, split: Split, keys_of: Callable[[Table], dict[int, str]]) -> Rows:
    """The rows of one split. `keys_of` gives, by their indices, the keys of the rows that can be used.

    With a held-out split of the source's own, a row whose key is in both splits is held out.

    Raises:
        DataError: the source cannot be read, or has no row for this split.
    """
    held_out = settings.held_out_split
    name = held_out if held_out is not None and split == "held_out" else settings.train_split
    table = load_table(settings.data, name)
    keys = keys_of(table)
    if held_out is None:
        chosen = [i for i, key in keys.items() if is_held_out(key, settings.held_out_fraction) is (split == "held_out")]
    else:
        elsewhere = set(keys_of(load_table(settings.data, held_out)).values()) if split == "train" else set()
        both = [i for i, key in keys.items() if key in elsewhere]
        say_dropped(settings, both, f"the same text as a row of the split {held_out!r}")
        chosen = [i for i, key in keys.items() if key not in elsewhere]
    # By hash, not by position: two files with the same texts in another order give the same order here.
    chosen.sort(key=lambda i: shuffled_place(keys[i]))
    if not chosen:
        whose = f"held_out_fraction={settings.held_out_fraction}" if held_out is None else f"held_out_split={held_out}"
        raise DataError(
            f"data={settings.data!r} has {len(keys)} texts and none of them falls into the {split} split ({whose}); "
            "use more texts or another fraction"
        )
    chosen = chosen[: settings.max_texts] if split == "train" else chosen
    return Rows(table, chosen, [keys[i] for i in chosen])


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


def text_rows(table: Table, settings: DataSettings, name: str, flag: str = "--text-column") -> dict[int, str]:
    """The texts of a column by their rows' indices. Rows without a text are left out, and said.

    Raises:
        DataError: there is no such column (`flag` names one), or something else than a text in it.
    """
    require_column(table, settings, name, flag)
    texts = table.columns[name]
    for number, text in enumerate(texts, start=1):
        where = f"data={settings.data!r}, row {number}, column {name!r}"
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {text!r:.60} is {kind_of(text)} and no text; write it as a string, or remove the row"
            )
        require_characters(text, where)
    say_dropped(settings, [i for i, text in enumerate(texts) if not text.strip()], "no text in the row")
    return {i: text for i, text in enumerate(texts) if text.strip()}


def _labelled_rows(table: Table, settings: DataSettings) -> dict[int, str]:
    """`text_rows`, less the rows without a label."""
    name = settings.label_column
    require_column(table, settings, settings.text_column, "--text-column")
    require_column(table, settings, name, "--label-column")
    texts, labels = text_rows(table, settings, settings.text_column), table.columns[name]
    for number, value in enumerate(labels, start=1):
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(
                f"data={settings.data!r}, row {number}, column {name!r}: {value!r:.60} is {kind_of(value)} and "
                "no label; give one word or number for each text"
            )
    say_dropped(settings, [i for i in texts if labels[i] in (None, "")], f"nothing in column {name!r}")
    return {i: text for i, text in texts.items() if labels[i] not in (None, "")}


def require_column(table: Table, settings: DataSettings, name: str, flag: str) -> None:
    """Raises `DataError` where the table lacks the column, with those that it has and the flag that names one."""
    if name not in table.columns:
        joined = any(mark in only for only in table.columns if len(table.columns) == 1 for mark in ";\t|")
        raise DataError(
            f"data={settings.data!r} has no column {name!r}; it has: {', '.join(table.columns) or 'none at all'}. "
            + ("Its values must be separated by commas" if joined else f"Name it with {flag}")
        )


_SAID: set[str] = set()


def say_dropped(settings: DataSettings, rows: Sequence[int], why: str) -> None:
    """Says once how many rows (by their indices) are not used, and why."""
    if rows:
        say_once(f"data={settings.data!r}: left out {len(rows)} with {why}; the first is row {rows[0] + 1}")


def say_once(line: str) -> None:
    """A line on stderr. A stage asks for both splits, and each may have the same to say."""
    if line not in _SAID:
        print(line, file=sys.stderr, flush=True)
        _SAID.add(line)
