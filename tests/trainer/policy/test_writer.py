"""A policy that only writes: its revision names the weights, and its answers are those of the plain model."""

import shutil
from pathlib import Path

import pytest

from harness.tiny_models import ARCHITECTURES, save, tiny_gpt2_dir
from plaudit.errors import ConfigError
from plaudit.policy.generation import Draws, decode_responses, generate
from plaudit.policy.writer import load_writer, revision_of
from plaudit.settings.policy import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=8)


def test_the_revision_of_a_copy_is_the_same_and_of_other_weights_another(policy_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(policy_dir, tmp_path / "copy")
    other = tiny_gpt2_dir(tmp_path / "other", seed=1)
    assert revision_of(copy) == revision_of(policy_dir) == load_writer(str(policy_dir)).revision
    assert revision_of(other) != revision_of(policy_dir)


def test_files_beside_the_weights_dont_change_the_revision(policy_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(policy_dir, tmp_path / "copy")
    (copy / "metrics.jsonl").write_text("{}\n")
    assert revision_of(copy) == revision_of(policy_dir)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_the_plain_model(architecture: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]()
    writer = load_writer(str(save(model, tmp_path)))
    queries, draws = [[5, 6, 7], [8]], Draws.of(SETTINGS, 2, seed=0, step=0)
    expected = decode_responses(writer.tokenizer, generate(model, queries, draws, SETTINGS, writer.tokenizer))
    assert writer.answer(queries, draws, SETTINGS) == expected


def test_prompts_that_dont_fit_are_refused_with_both_numbers(policy_dir: Path) -> None:
    writer = load_writer(str(policy_dir))
    with pytest.raises(ConfigError, match="has 64 positions"):
        writer.check([[5] * 60], ["x"], SETTINGS)


def test_a_directory_that_isnt_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"policy='{tmp_path}/none': no such directory"):
        load_writer(f"{tmp_path}/none")
