"""The benchmark of settings: what it would run, and its table. The runs themselves are the benchmark."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning.settings import (
    DEFAULT,
    NAMES,
    OF_PPO,
    OF_REWARD,
    Result,
    changed,
    draw,
    interval,
    result_of,
    table,
)
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig

URL = "http://127.0.0.1:1"
CONFIG = dataclasses.replace(presets.load(PPOConfig, Path("presets/demo.yaml")), steps=16)


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_makes_a_config_that_differs_from_the_default_in_it_alone(name: str) -> None:
    default, config = changed(CONFIG, DEFAULT, URL), changed(CONFIG, name, URL)
    assert config.ppo == dataclasses.replace(default.ppo, **OF_PPO.get(name, {}))
    assert [c.weight for c in config.reward.components] == ([1.0, -1.0] if name in OF_REWARD else [1.0])
    assert dataclasses.replace(config, ppo=default.ppo, reward=default.reward) == default
    assert (config == default) == (name == DEFAULT)


def test_the_table_compares_runs_of_the_same_seed() -> None:
    results = [Result(DEFAULT, seed, 16, {}, float(seed), 2.0, 30.0) for seed in range(3)]
    results += [Result("rloo", seed, 16, {}, seed + 0.5, 3.0, 20.0) for seed in range(3)]
    *_, default, rloo = table(results, [DEFAULT, "rloo"])
    # Standard deviation 1 over three seeds, and the t quantile 4.30: 4.30 / sqrt(3).
    assert default == "| default | +1.00 (-1.48 to +3.48) | 2.00 (2.00 to 2.00) |  |  | 30 |"
    assert rloo.endswith("| 3.00 (3.00 to 3.00) | +0.50 (+0.50 to +0.50) | +1.00 (+1.00 to +1.00) | 20 |")
    assert interval([1.25], "{:+.2f}") == "+1.25"


def test_the_picture_has_each_seed_s_differences_and_their_mean() -> None:
    results = [Result(DEFAULT, seed, 2, {}, seed + 1.0, 2.0, 30.0) for seed in (0, 1)]
    results += [
        Result("rloo", seed, 2, {}, seed + 1.0 + difference, 3.0, 20.0) for seed, difference in ((0, 0.5), (1, 1.0))
    ]
    reward, kl = draw(results, [DEFAULT, "rloo"]).axes
    assert [np.asarray(line.get_xdata()).tolist() for line in reward.lines[:2]] == [[0.5, 1.0], [0.75]]
    assert [np.asarray(line.get_xdata()).tolist() for line in kl.lines[:2]] == [[1.0, 1.0], [1.0]]


def test_a_run_that_is_there_is_not_taken_again_and_that_of_other_settings_is_refused(tmp_path: Path) -> None:
    made = Result("rloo", 1, 16, OF_PPO["rloo"], 1.0, 2.0, 30.0)
    (tmp_path / "rloo.json").write_text(json.dumps(dataclasses.asdict(made)))
    config = dataclasses.replace(changed(CONFIG, "rloo", URL), seed=1, output_dir=tmp_path / "rloo")
    assert result_of(config, "rloo", OF_PPO["rloo"]) == made
    with pytest.raises(SystemExit, match=r"rloo\.json has 16 steps of .*: remove it, or name other --runs"):
        result_of(dataclasses.replace(config, steps=4), "rloo", OF_PPO["rloo"])
