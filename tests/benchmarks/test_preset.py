"""The benchmark of the demo's preset: what it would run, its measures and its table. The runs are the benchmark."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.learning.preset import (
    CANDIDATES,
    TODAY,
    Run,
    Texts,
    changed,
    first_reach,
    has_a_word_three_times,
    run_of,
    samples_table,
    smoothed,
    table,
)
from plaudit.settings import files as presets
from plaudit.settings.ppo import PPOConfig

CONFIG = presets.load(PPOConfig, Path("presets/demo.yaml"))
TEXTS = {"repeated_words": 0.125, "three_times": 0.5, "distinct_pairs": 0.9}
RUN = Run(
    candidate=TODAY,
    seed=0,
    changes={},
    cpu_s=60.0,
    steps_reward=[0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    steps_kl=[0.0, 0.0, 0.0, 0.0, 10.0, 10.0],
    n_prompts=2,
    reward=1.25,
    kl=10.0,
    perplexity=40.0,
    reward_before=-0.01,
    perplexity_before=61.0,
    rewards=[1.0, 1.5],
    texts=TEXTS,
    texts_before=TEXTS | {"three_times": 0.0},
    samples=[["A film", " is | bad\n.", " is good."]],
)


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_a_candidate_changes_the_algorithm_alone(name: str) -> None:
    config = changed(CONFIG, name)
    assert dataclasses.replace(config, steps=CONFIG.steps, ppo=CONFIG.ppo) == CONFIG
    assert (config == CONFIG) == (name == TODAY)


def test_the_preset_without_a_value_head_is_the_candidate_that_was_measured() -> None:
    preset = presets.load(PPOConfig, Path("presets/demo-rloo.yaml"))
    measured = changed(CONFIG, "fresh-rloo")
    # The preset leaves out the rate of a head that it doesn't have.
    assert dataclasses.replace(measured.ppo, value_head_learning_rate=None) == preset.ppo
    assert dataclasses.replace(measured, ppo=preset.ppo, output_dir=preset.output_dir) == preset


def test_repetition_is_counted_within_a_response_and_over_all() -> None:
    texts = Texts.of([" Good, good and GOOD film", " the the the end", " so so"])
    # Words by white space, as in the audit: "the" twice and "so" once of 5 + 4 + 2 words.
    assert texts.repeated_words == 3 / 11
    assert texts.three_times == 1 / 3
    # 4 + 3 + 1 pairs, of which ("the", "the") occurs twice.
    assert texts.distinct_pairs == 7 / 8
    assert not has_a_word_three_times("it's fine, fine. the the the")
    assert has_a_word_three_times("finely Finely; FINELY")


def test_rewards_are_compared_where_the_kl_is_first_reached() -> None:
    assert first_reach([0.0, 2.0, 6.0, 1.0, 9.0], [0.0, 1.0, 2.0, 3.0, 4.0], 3.0) == 1.25
    assert first_reach([0.0, 2.0], [0.0, 1.0], 2.0) == 1.0
    assert first_reach([0.0, 2.0], [0.0, 1.0], 2.5) is None
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0, 11.0]) == [3.0, 5.0]
    # Smoothed, the KL goes from 2 to 4 nats and the reward from 0 to 0.2.
    assert RUN.reward_at(3.0) == pytest.approx(0.1)
    assert RUN.reward_at(5.0) is None


def test_the_table_has_the_start_and_a_row_for_each_candidate() -> None:
    other = dataclasses.replace(RUN, candidate="rloo-4", kl=5.0, rewards=[1.5, 2.0])
    *_, start, today, rloo = table([RUN, other])
    assert start == "| the start | -0.01 |  | 0 |  |  |  |  | 61 | 12.5 % | 0.0 % | 90.0 % | |"
    assert today == "| today | +1.25 |  | 10.00 |  | +0.10 |  |  | 40 | 12.5 % | 50.0 % | 90.0 % | 60 |"
    # A single seed is paired by prompt, several by seed: the mean of 0.5 and 0.5, and of -0.25 three times.
    assert rloo.startswith("| rloo-4 | +1.25 | +0.50 (+0.50 to +0.50) | 5.00 | 0.50 |")
    seeds = [dataclasses.replace(RUN, seed=seed, reward=1.25 + seed) for seed in range(3)]
    seeds += [dataclasses.replace(other, seed=seed, reward=1.0 + seed) for seed in range(3)]
    assert "| -0.25 (-0.25 to -0.25) |" in table(seeds)[-1]
    later = dataclasses.replace(RUN, seed=1, samples=[["A film", "", " of a later seed"]])
    assert samples_table([RUN, later, other])[-1] == "| A film | is bad . | is good. | is good. |"


def test_a_run_that_is_there_is_not_taken_again_and_that_of_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "today.json").write_text(json.dumps(dataclasses.asdict(RUN)))
    assert run_of(TODAY, 0, CONFIG, tmp_path / "today", n_prompts=2) == RUN
    with pytest.raises(SystemExit, match=r"today\.json has 2 prompts of \{\}: remove it or name other --runs"):
        run_of(TODAY, 0, CONFIG, tmp_path / "today", n_prompts=4)
