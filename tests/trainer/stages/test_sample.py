"""Answers for people to rank: the same for a seed however the run was cut up, and from training texts alone."""

import dataclasses
import json
from pathlib import Path

import filelock
import pytest

from harness.ranking_service import KEY, RankingService
from harness.tiny_models import tiny_gpt2
from plaudit import cli, errors
from plaudit.data.sources import load_texts
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.people import PeopleSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.sample import SampleConfig
from plaudit.stages import sample
from plaudit.wire import rankings as wire


@pytest.fixture
def config(policy_dir: Path, reviews: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(
        policy=str(policy_dir),
        to=str(tmp_path / "answers.jsonl"),
        output_dir=tmp_path / "out",
        k=3,
        n=10,
        dataset=DataSettings(str(reviews), held_out_fraction=0.3),
        prompts=PromptSettings(min_tokens=6, max_tokens=12),
        generation=GenerationSettings(batch_size=12),
        seed=5,
    )


def rows_of(config: SampleConfig) -> list[wire.AnswersRow]:
    return [wire.AnswersRow.model_validate_json(line) for line in config.file.read_text().splitlines()]


def test_every_prompt_has_k_answers_and_the_group_of_a_training_text(config: SampleConfig) -> None:
    result = sample.run(config)
    rows = rows_of(config)
    groups = {
        split: {wire.group_of(text) for text in load_texts(config.dataset, split)} for split in ("train", "held_out")
    }
    assert (result.prompts, result.generated) == (10, 10)
    assert len({row.prompt for row in rows}) == 10
    for row in rows:
        assert (len(row.answers), row.split, row.batch) == (3, "train", "round-0")
        assert row.group in groups["train"]
        assert row.group not in groups["held_out"]
        assert row.id == wire.task_id(row.batch, row.prompt, row.answers)
        assert {answer.policy for answer in row.answers} == {config.policy}


def test_a_round_that_skips_goes_on_where_the_one_before_ended(config: SampleConfig, tmp_path: Path) -> None:
    later = dataclasses.replace(config, skip=4, n=6, to=str(tmp_path / "later.jsonl"))
    sample.run(config)
    sample.run(later)
    assert rows_of(later) == rows_of(config)[4:]


def test_each_prompt_is_the_opening_of_the_text_whose_group_it_has(config: SampleConfig) -> None:
    sample.run(config)
    text_of = {wire.group_of(text): text for text in load_texts(config.dataset, "train")}
    for row in rows_of(config):
        assert isinstance(row.prompt, str)
        assert text_of[row.group].startswith(row.prompt)


def test_the_batch_size_changes_no_answer_and_the_seed_does(config: SampleConfig, tmp_path: Path) -> None:
    sample.run(config)
    one_by_one = dataclasses.replace(
        config, to=str(tmp_path / "again.jsonl"), generation=GenerationSettings(batch_size=1)
    )
    sample.run(one_by_one)
    assert one_by_one.file.read_bytes() == config.file.read_bytes()
    other = dataclasses.replace(config, to=str(tmp_path / "other.jsonl"), seed=6)
    sample.run(other)
    assert rows_of(other)[0].answers != rows_of(config)[0].answers


def test_a_run_goes_on_and_ends_with_the_file_of_one_that_was_never_stopped(config: SampleConfig) -> None:
    sample.run(config)
    whole = config.file.read_bytes()
    lines = whole.splitlines(keepends=True)
    config.file.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    result = sample.run(config)
    assert result.generated == 4
    assert config.file.read_bytes() == whole
    assert sample.run(config).generated == 0
    more = dataclasses.replace(config, n=12)
    assert sample.run(more).generated == 2
    assert more.file.read_bytes().startswith(whole)


def test_texts_that_begin_the_same_are_one_prompt_and_are_counted(config: SampleConfig) -> None:
    short = dataclasses.replace(config, prompts=PromptSettings(min_tokens=6, max_tokens=6))
    result = sample.run(dataclasses.replace(short, n=2))
    prompts = [row.prompt for row in rows_of(config)]
    assert len(set(prompts)) == 2
    texts = load_texts(config.dataset, "train")
    seen = next(i for i, text in enumerate(texts) if text.startswith(str(prompts[1])))
    assert result.merged_prompts == seen - 1


def test_more_prompts_than_there_are_is_refused_with_both_numbers(config: SampleConfig) -> None:
    with pytest.raises(ConfigError, match=r"n=5000 but data=.* has \d+ different prompts in its training split"):
        sample.run(dataclasses.replace(config, n=5000))


def test_answers_that_repeat_another_one_are_counted(config: SampleConfig) -> None:
    greedy = dataclasses.replace(config, generation=GenerationSettings(4, 4, top_k=1, batch_size=12))
    assert sample.run(greedy).same_answers == 10 * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "was begun with seed=5, and now it is 6"),
        ({"k": 2}, "was begun with k=3, and now it is 2"),
        ({"n": 5}, "holds 10 prompts and n=5"),
        (
            {"generation": GenerationSettings(temperature=0.5)},
            "was begun with generation.temperature=1.0, and now it is 0.5",
        ),
    ],
)
def test_a_file_of_other_settings_is_left_alone_and_says_which(
    config: SampleConfig, change: dict[str, object], words: str
) -> None:
    sample.run(config)
    before = config.file.read_bytes()
    with pytest.raises(ConfigError, match=words):
        sample.run(dataclasses.replace(config, **change))  # type: ignore[arg-type]
    assert config.file.read_bytes() == before


def test_a_row_of_another_run_is_named_by_its_line(config: SampleConfig) -> None:
    sample.run(config)
    lines = config.file.read_text().splitlines(keepends=True)
    config.file.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ConfigError, match="line 1: another prompt than this run's"):
        sample.run(config)
    config.file.write_text(lines[0] + "{}\n" + lines[2])
    with pytest.raises(ConfigError, match="line 2: no row of answers"):
        sample.run(config)


def test_adapters_write_otherwise_than_their_base_and_under_another_revision(
    config: SampleConfig, policy_dir: Path, tmp_path: Path
) -> None:
    import torch

    model = add_lora(tiny_gpt2(), LoraSettings(r=4))
    model.peft_config["default"].base_model_name_or_path = str(policy_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapters")
    sample.run(config)
    other = dataclasses.replace(config, policy=str(tmp_path / "adapters"), to=str(tmp_path / "other.jsonl"))
    sample.run(other)
    for row, other_row in zip(rows_of(config), rows_of(other), strict=True):
        assert row.prompt == other_row.prompt
        assert row.answers[0].revision != other_row.answers[0].revision
    assert [r.answers[0].text for r in rows_of(config)] != [r.answers[0].text for r in rows_of(other)]


def test_answers_go_straight_into_the_ranking_service_and_twice_is_harmless(
    config: SampleConfig, service: RankingService, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    people = PeopleSettings(batch="first", overlap=2, overlap_share=1.0, api_key_file=key, instructions="Be kind.")
    there = dataclasses.replace(config, to=service.url, people=people, round=1)
    sample.run(there)
    sample.run(there)
    progress = service.progress("first")
    assert (progress["tasks"], progress["wanted"], progress["round"]) == (10, 20, 1)
    with service.annotator() as person:
        task = person.get("/").json()
    assert task["task"] == rows_of(there)[0].id
    assert {answer["text"] for answer in task["answers"]} == {answer.text for answer in rows_of(there)[0].answers}


def test_a_service_with_another_key_is_refused_before_anything_is_written(
    config: SampleConfig, service: RankingService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("wrong")
    flags = ["--policy", config.policy, "--data", config.dataset.data, "--people.api-key-file", str(key)]
    code = cli.run(["sample", *flags, "--to", service.url, "--output-dir", str(config.output_dir)])
    assert code == errors.EXIT_REJECTED
    assert "401" in capsys.readouterr().err.splitlines()[-1]
    assert not config.file.exists()


def test_a_service_that_is_away_ends_with_75_and_the_command_that_goes_on(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK_API_KEY", KEY)
    code = cli.run(["sample", "--policy", config.policy, "--to", "http://127.0.0.1:9", "--people.patience-s", "0.1"])
    assert code == errors.EXIT_UNAVAILABLE
    assert "plaudit sample --policy" in capsys.readouterr().err.splitlines()[-2]


def test_two_runs_dont_write_one_file(config: SampleConfig) -> None:
    lock = filelock.FileLock(config.file.with_name(".answers.jsonl.lock"))
    with lock, pytest.raises(ConfigError, match="is being written by another run"):
        sample.run(config)


def test_the_settings_stand_beside_the_answers(config: SampleConfig) -> None:
    sample.run(config)
    recorded = json.loads(Path(f"{config.file}.settings.json").read_text())
    assert (recorded["seed"], recorded["k"], recorded["policy"]) == (5, 3, config.policy)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 1}, "k=1 must lie between 2 and 9"),
        ({"n": 0}, "n=0 must be 1 or more"),
        ({"round": -1}, "round=-1 must lie between 0 and"),
        ({"to": "ftp://rank"}, "to='ftp://rank' must start with http"),
    ],
)
def test_settings_that_cant_work_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SampleConfig(**settings)  # type: ignore[arg-type]


def test_instructions_that_the_service_would_refuse_are_refused_here() -> None:
    with pytest.raises(ConfigError, match="instructions has 20001 characters"):
        PeopleSettings(instructions="x" * 20_001)


@pytest.mark.parametrize("batch", ["", "a b", "-a", "x" * 65, "é"])
def test_batches_that_the_service_would_refuse_are_refused_here(batch: str) -> None:
    with pytest.raises(ConfigError, match="batch="):
        PeopleSettings(batch=batch)
