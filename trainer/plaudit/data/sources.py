"""Texts and labels from the hub, a package or a local file, and the split of each row.

Failure mode: one stage trains on a text that another one evaluates on. The split therefore depends only on a hash of
the text, so it is the same in every stage, for every order of the source and for every copy of a text.
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
    """Texts with one label each, in a shuffled order that depends only on the texts."""

    texts: list[str]
    labels: list[Label]
    class_names: tuple[str, ...] | None = None
    """The source's own names of the labels 0, 1, ..., if it has any."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in an order that depends only on their keys."""

    table: Table
    indices: list[int]
    """Indices of the rows in the table."""
    keys: list[str]
    """The text of each row that determines its split and order."""

    def column(self, name: str) -> list[Any]:
        """The rows' values in a column."""
        values = self.table.columns[name]
        return [values[i] for i in self.indices]


def load_texts(settings: DataSettings, split: Split) -> list[str]:
    """The texts of one split, shuffled reproducibly.

    Raises:
        DataError: the source cannot be read, lacks the text column, or has values that are not text.
    """
    return rows_of_split(settings, split, lambda table: text_rows(table, settings, settings.text_column)).keys


def load_labelled_texts(settings: DataSettings, split: Split) -> LabelledTexts:
    """Texts and labels of one split, in the same order as `load_texts`.

    Raises:
        DataError: the source cannot be read, lacks one of the columns, or has invalid values.
    """
    name = settings.label_column
    rows = rows_of_split(settings, split, lambda table: _labelled_rows(table, settings))
    return LabelledTexts(rows.keys, rows.column(name), rows.table.class_names.get(name))


def rows_of_split(settings: DataSettings, split: Split, keys_of: Callable[[Table], dict[int, str]]) -> Rows:
    """The rows of one split. `keys_of` returns the keys of all usable rows, by index.

    If the source has its own held-out split, a row whose key is in both splits is held out.

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
    """The number of rows and a hash of them in order; equal for equal data on any machine."""
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
    """The sort key of a split: a hash of the text."""
    return hashlib.sha256(b"order" + text.encode("utf-8", "surrogatepass")).digest()


def text_rows(table: Table, settings: DataSettings, name: str, flag: str = "--text-column") -> dict[int, str]:
    """The texts of a column, by row index. Rows without a text are left out, with a message.

    Raises:
        DataError: the column does not exist (`flag` sets it), or has a value that is not text.
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
    """`text_rows` without the rows that have no label."""
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
    """Raises `DataError` if the column is missing, with the existing columns and the flag to use."""
    if name not in table.columns:
        joined = any(mark in only for only in table.columns if len(table.columns) == 1 for mark in ";\t|")
        raise DataError(
            f"data={settings.data!r} has no column {name!r}; it has: {', '.join(table.columns) or 'none at all'}. "
            + ("Its values must be separated by commas" if joined else f"Name it with {flag}")
        )


_SAID: set[str] = set()


def say_dropped(settings: DataSettings, rows: Sequence[int], why: str) -> None:
    """Print once how many rows are not used, and why."""
    if rows:
        say_once(f"data={settings.data!r}: left out {len(rows)} with {why}; the first is row {rows[0] + 1}")


def say_once(line: str) -> None:
    """Print a line to stderr, once: both splits of a source may give the same message."""
    if line not in _SAID:
        print(line, file=sys.stderr, flush=True)
        _SAID.add(line)
