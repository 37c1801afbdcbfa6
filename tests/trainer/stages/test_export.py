"""What `plaudit export` writes, loaded with transformers and peft alone, is the policy that the run trained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plaudit import cli, errors
from plaudit.errors import ConfigError, NotAsSaved
from plaudit.policy import merging
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.settings.export import ExportConfig
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import export, ppo

TEXT = "the film was good and the plot was bad"


def logits(model: Any, directory: Path | str) -> torch.Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=ids).logits)


_RUN: list[Path] = []
"""The output directory of the one run that all tests copy."""


@pytest.fixture
def run(config: PPOConfig, tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    """A finished run of three steps."""
    if not _RUN:
        _RUN.append(tmp_path_factory.mktemp("finished") / "run")
        ppo.run(dataclasses.replace(config, output_dir=_RUN[0]))
    shutil.copytree(_RUN[0], config.output_dir)
    return config


@pytest.fixture
def stopped(run: PPOConfig) -> PPOConfig:
    """A run that was stopped after its last checkpoint, without results."""
    for file in (*run.output_dir.glob("adapter*"), run.output_dir / "value_head.safetensors"):
        file.unlink()
    return run


def test_a_finished_run_is_exported_merged_and_as_adapters(run, tmp_path, capsys):
    merged = export.run(ExportConfig(str(run.output_dir), tmp_path / "merged"))
    adapters = export.run(ExportConfig(str(run.output_dir), tmp_path / "adapters", "adapters"))
    expected = logits(load_policy(run.output_dir).language_model, run.policy)
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(whole, merged), expected, atol=1e-5, rtol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.policy)
    before = logits(base, run.policy)
    on_base = peft.PeftModel.from_pretrained(base, adapters)
    torch.testing.assert_close(logits(on_base, adapters), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-4)  # the run has moved it
    assert not [*merged.glob("adapter*"), *merged.glob("value_head*"), *adapters.glob("value_head*")]
    assert "loaded again with plain peft (float32), log-probabilities differ by at most" in capsys.readouterr().out


def test_a_stopped_run_gives_its_newest_checkpoint(stopped, tmp_path, capsys):
    directory = export.run(ExportConfig(str(stopped.output_dir), tmp_path / "out"))
    assert f"exporting {stopped.output_dir}/checkpoints/step-000003" in capsys.readouterr().out
    assert json.loads((directory / "export.json").read_text())["form"] == "merged"
    trained = load_file(stopped.output_dir / "checkpoints" / "step-000003" / "trainable.safetensors")
    policy = load_policy(stopped.policy, stopped.lora)
    policy.load_state_dict(trained, strict=False)
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory)
    expected = logits(policy.language_model, stopped.policy)
    torch.testing.assert_close(logits(whole, directory), expected, atol=1e-5, rtol=1e-5)


def test_an_earlier_checkpoint_is_exported_by_its_name(stopped, tmp_path):
    earlier = stopped.output_dir / "checkpoints" / "step-000002"
    two = export.run(ExportConfig(str(earlier), tmp_path / "two"))
    three = export.run(ExportConfig(str(stopped.output_dir), tmp_path / "three"))
    assert any(
        not torch.equal(tensor, load_file(three / "model.safetensors")[name])
        for name, tensor in load_file(two / "model.safetensors").items()
    )


def test_all_parameters_are_exported_as_a_whole_model_and_not_as_adapters(config, tmp_path):
    config = dataclasses.replace(config, lora=LoraSettings(enabled=False), steps=1)
    ppo.run(config)
    merged = export.run(ExportConfig(str(config.output_dir), tmp_path / "whole"))
    own, exported = load_file(config.output_dir / "model.safetensors"), load_file(merged / "model.safetensors")
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[name], exported[name]) for name in own)
    with pytest.raises(ConfigError, match="has no adapters, since all parameters were trained"):
        export.run(ExportConfig(str(config.output_dir), tmp_path / "adapters", "adapters"))


def test_files_that_load_as_another_policy_are_not_left_behind(run, tmp_path, monkeypatch):
    def damaged(policy: Any, directory: Path, *_: Any) -> None:
        whole(policy, directory)
        tensors = load_file(directory / "model.safetensors")
        name = next(name for name in tensors if name.endswith("ln_f.weight"))
        save_file(tensors | {name: tensors[name] * 2}, directory / "model.safetensors", {"format": "pt"})

    whole = merging.merge_policy
    monkeypatch.setattr(f"{export.__name__}.merge_policy", damaged)
    with pytest.raises(NotAsSaved, match=r"loaded again, it differs from the policy by \d"):
        export.run(ExportConfig(str(run.output_dir), tmp_path / "out"))
    assert not [file for file in (tmp_path / "out").glob("*") if not file.name.startswith(".")]


def test_what_is_no_run_and_a_directory_in_use_are_one_line_each(run, tmp_path, capsys):
    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, says in (
        ([str(tmp_path / "full"), str(tmp_path / "out")], "is no run of `plaudit ppo` and none of its checkpoints"),
        ([str(run.output_dir), str(tmp_path / "full")], "is not empty: name a new directory"),
    ):
        assert cli.run(["export", *arguments]) == errors.EXIT_USAGE
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_run_without_a_checkpoint_is_told_so(stopped, tmp_path):
    for manifest in stopped.output_dir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match="neither results nor a checkpoint yet"):
        export.run(ExportConfig(str(stopped.output_dir), tmp_path / "out"))


def test_the_tokenizer_is_the_policys(run, tmp_path):
    directory = export.run(ExportConfig(str(run.output_dir), tmp_path / "out"))
    own = load_tokenizer(run.policy)
    assert transformers.AutoTokenizer.from_pretrained(directory).get_vocab() == own.get_vocab()
