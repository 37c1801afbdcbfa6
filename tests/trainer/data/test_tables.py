"""Text is read as text: nothing is guessed, shifted or left out unsaid, whatever the kind of file."""

import json
from pathlib import Path
from typing import Any

import pytest

from plaudit.data import sources
from plaudit.data.sources import LabelledTexts, fingerprint
from plaudit.data.tables import DataError
from plaudit.settings.data import DataSettings

WORDS_THAT_MEAN_NOTHING_ELSEWHERE = ["None", "NA", "N/A", "null", "nan", "007", "1e5", "12.50", "2020-01-01", "True"]


def labelled(path: Path, **settings: Any) -> LabelledTexts:
    """All rows but a thousandth, as a stage reads them."""
    return sources.load_labelled_texts(DataSettings(str(path), held_out_fraction=1e-9, **settings), "train")


def pairs(path: Path) -> list[tuple[str, object]]:
    found = labelled(path)
    return sorted(zip(found.texts, found.labels, strict=True))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_words_that_other_parsers_take_for_missing_values_numbers_or_dates_stay_words(
    tmp_path: Path, kind: str
) -> None:
    path, words = tmp_path / f"words.{kind}", WORDS_THAT_MEAN_NOTHING_ELSEWHERE
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{word},{word}\n" for word in words))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": word, "label": word}) + "\n" for word in words))
    else:
        import pandas as pd

        pd.DataFrame({"text": words, "label": words}).to_parquet(path)
    assert pairs(path) == sorted((word, word) for word in words)


def test_a_column_called_date_is_text_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "dates.jsonl"
    path.write_text('{"date": "2020-01-01", "label": 1}\n{"date": "2020-01-02", "label": 0}\n')
    assert sorted(labelled(path, text_column="date").texts) == ["2020-01-01", "2020-01-02"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", "\ufefftext,label\none,1\ntwo,0\n"),
        ("bom.jsonl", '\ufeff{"text": "one", "label": "1"}\n{"text": "two", "label": "0"}\n'),
        ("crlf.jsonl", '{"text": "one", "label": "1"}\r\n\r\n{"text": "two", "label": "0"}\r\n'),
        ("UPPER.CSV", "text,label\none,1\ntwo,0\n"),
    ],
)
def test_byte_order_marks_line_ends_and_capitals_change_nothing(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert pairs(path) == [("one", "1"), ("two", "0")]


def test_a_text_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\u2028still one\x0cstill\ntwo\n".encode())
    texts = sources.load_texts(DataSettings(str(path), held_out_fraction=1e-9), "train")
    assert sorted(texts) == ["one\u2028still one\x0cstill", "two"]


def test_quoted_commas_quotes_and_line_feeds_belong_to_the_text(tmp_path: Path) -> None:
    path = tmp_path / "quoted.csv"
    path.write_text('text,label\n"He said ""hi"", ok\nsecond line",0\n"a,b",1\nd "e" f,1\n')
    assert pairs(path) == [('He said "hi", ok\nsecond line', "0"), ("a,b", "1"), ('d "e" f', "1")]


def test_a_text_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(f"text,label\n{'x' * 200_000},0\nshort,1\n")
    assert max(len(text) for text in labelled(path).texts) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("all.csv", b"text,label\nHello, world,0\nbye, bye,1\n", r"row 1 \(line 2\) has 3 values for the 2 columns"),
        ("one.csv", b"text,label\nfine,1\nHello, world,0\n", r"row 2 \(line 3\) has 3 values for the 2 columns"),
        ("few.csv", b"text,label\nfine\n", r"row 1 \(line 2\) has 1 values for the 2 columns"),
        ("open.csv", b'text,label\n"never closed,1\nb,0\n', "could not be read: unexpected end of data"),
        ("twice.csv", b"text,text,label\na,b,0\n", "two columns are called 'text'"),
        ("semicolons.csv", b"text;label\na;0\n", "must be separated by commas"),
        ("latin.csv", "text,label\ncaf\u00e9,0\n".encode("latin-1"), "byte 0xe9 at position 14 is not UTF-8.*iconv"),
        (
            "null.jsonl",
            b'{"text": "a", "label": 1}\n{"text": null, "label": 1}\n',
            "row 2, column 'text': None is a mi",
        ),
        ("list.jsonl", b'{"text": ["a"], "label": 1}\n', "row 1, column 'text': .* is of type list and no text"),
        ("dict.jsonl", b'{"text": {"a": 1}, "label": 1}\n', "row 1, column 'text': .* is of type dict and no text"),
        ("number.jsonl", b'{"text": 7, "label": 1}\n', "row 1, column 'text': 7 is of type int and no text"),
        ("labels.jsonl", b'{"text": "a", "label": [0, 1]}\n', "row 1, column 'label': .* is of type list and no label"),
        ("half.jsonl", b'{"text": "a \\ud83d b", "label": 1}\n', "row 1.*half a character"),
        ("line.jsonl", b'{"text": "a", "label": 1}\n[1]\n', "line 2 is no JSON object"),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        labelled(path)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("texts", [[["a", "b"], ["c"]], [b"a", b"b"], [1, 2]])
def test_lists_bytes_and_numbers_of_a_parquet_file_are_no_text(tmp_path: Path, texts: list[Any]) -> None:
    import pandas as pd

    path = tmp_path / "odd.parquet"
    pd.DataFrame({"text": texts, "label": [0, 1]}).to_parquet(path)
    with pytest.raises(DataError, match="row 1, column 'text'"):
        labelled(path)


def test_rows_without_a_label_or_a_text_are_left_out_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("text,label\na,0\nb,\nc,1\n ,1\nd,\n")
    assert pairs(path) == [("a", "0"), ("c", "1")]
    assert capsys.readouterr().err.splitlines() == [
        f"data='{path}': left out 1 with no text in the row; the first is row 4",
        f"data='{path}': left out 2 with nothing in column 'label'; the first is row 2",
    ]


def test_csv_files_of_a_directory_are_read_as_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.csv").write_text("text,label\n007,None\nNA,toxic\n")
    assert pairs(directory) == [("007", "None"), ("NA", "toxic")]


def test_the_names_that_a_data_set_gives_its_labels_come_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert labelled(tmp_path / "data").class_names == ("neg", "pos")


def test_a_file_that_was_edited_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\none,0\n")
    assert labelled(path).texts == ["one"]
    path.write_text("text,label\nanother one,0\n")
    assert labelled(path).texts == ["another one"]


def test_a_fingerprint_is_that_of_rows_and_their_order() -> None:
    rows = [([1, 2], "a"), ([3], "b")]
    assert fingerprint(rows) == fingerprint([[[1, 2], "a"], [[3], "b"]])
    assert fingerprint(rows).startswith("2 rows, sha256 ")
    assert len({fingerprint(rows), fingerprint(rows[::-1]), fingerprint([([1, 2], "a"), ([3], "c")])}) == 3
