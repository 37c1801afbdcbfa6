"""What was written before everything was imported as `plaudit` still loads: a run, its checkpoint, its settings file.

The fixture was made by version 0.1.0: `settings.yaml` run to step 2 (`run/`), and in another directory to step 4
(`whole/`). Rewards come from `judge.py`, so that no service is needed.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.runs import single_threaded
from plaudit.rewards.settings import RewardComponent
from plaudit.run.metrics import read_metrics
from plaudit.settings import files
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo

FIXTURE = Path(__file__).parent / "fixtures" / "before_plaudit_namespace"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return tmp_path


def test_a_settings_file_with_also_gives_one_list_of_rewards(directory: Path) -> None:
    length, vowels = files.load(PPOConfig, Path("settings.yaml")).reward.components
    assert length == RewardComponent("length", weight=2.0, function="judge:length")
    assert vowels == RewardComponent("vowels", weight=-1.0, function="judge:vowels")


def test_a_settings_file_with_url_function_and_its_weight_gives_two_rewards(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("reward: {url: ['http://a'], function: 'judge:length', function_weight: 0.5, weight: 2.0}\n")
    assert files.load(PPOConfig, path).reward.components == (
        RewardComponent("reward", weight=2.0, url=("http://a",)),
        RewardComponent("length", weight=0.5, function="judge:length"),
    )


def test_a_run_goes_on_from_its_checkpoint_as_the_version_that_began_it_would_have(directory: Path) -> None:
    settings = files.load(PPOConfig, Path("settings.yaml"))
    ran = single_threaded(ppo.run, dataclasses.replace(settings, steps=4, resume="auto"))
    before, after = read_metrics(directory / "whole/metrics.jsonl"), read_metrics(ran.output_dir / "metrics.jsonl")
    assert [record["step"] for record in after] == [0, 1, 2, 3]
    timeless = [name for name in before[-1] if not name.startswith(("time/", "memory/"))]
    for name in timeless:
        assert after[-1][name] == pytest.approx(before[-1][name], rel=1e-5, abs=1e-6), name
    for file in ("adapter_model.safetensors", "value_head.safetensors"):
        expected, got = load_file(directory / "whole" / file), load_file(ran.output_dir / file)
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert json.loads((ran.output_dir / "run.json").read_text())["reward"]["components"][0]["name"] == "length"
