"""Settings that a run chooses: by hand, and that nothing given is changed."""

import dataclasses
from pathlib import Path

import pytest

from plaudit.errors import ConfigError
from plaudit.run.checkpoint import check_same_run
from plaudit.settings import files
from plaudit.settings.data import PromptSettings
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters, PPOSettings
from plaudit.settings.starting_points import (
    RATES,
    Stage,
    batch_for,
    chosen_optimizer,
    chosen_ppo,
    learning_rate,
    mini_batch_of,
    ppo_steps,
)
from plaudit.settings.supervised import OptimizerSettings

GPT2 = 124_439_808


def choose(settings: PPOSettings, prompts: int = 5000, parameters: int = GPT2) -> tuple[PPOHyperparameters, str]:
    return chosen_ppo(settings, {}, parameters=parameters, adapters=True, prompts=prompts)


@pytest.mark.parametrize("preset", ["demo", "gpt2-imdb"])
def test_a_preset_with_explicit_values_keeps_all_of_them(preset: str) -> None:
    given = files.load(PPOConfig, Path(preset)).ppo
    chosen, line = choose(given)
    assert dataclasses.asdict(chosen) == dataclasses.asdict(given)
    assert line == ""


def test_the_step_api_has_the_published_values() -> None:
    published = PPOHyperparameters()
    assert (published.learning_rate, published.batch_size, published.mini_batch_size, published.init_kl_coef) == (
        *(1.41e-5, 128, 128, 0.2),
    )


def test_open_settings_are_chosen_and_said() -> None:
    chosen, line = choose(PPOSettings(ppo_epochs=2), prompts=337)
    assert (chosen.learning_rate, chosen.batch_size, chosen.mini_batch_size) == (pytest.approx(1e-4), 128, 128)
    assert (chosen.init_kl_coef, chosen.ppo_epochs) == (0.05, 2)
    assert line == (
        "chosen for 124.4 million parameters, adapters trained, 337 prompts: ppo.learning_rate=0.0001, "
        "ppo.batch_size=128, ppo.mini_batch_size=128, ppo.init_kl_coef=0.05"
    )


@pytest.mark.parametrize("stage", list(RATES))
def test_larger_models_never_get_a_higher_rate(stage: Stage) -> None:
    sizes = [10**6, 10**7, 10**8, 10**9, 10**10, 10**11]
    rates = [learning_rate(stage, size, adapters=False) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(stage, 10**8, adapters=True) == pytest.approx(10 * learning_rate(stage, 10**8, adapters=False))


def test_gpt2_and_distilbert_keep_their_rates_of_stages_1_and_2() -> None:
    assert learning_rate("sft", GPT2, adapters=False) == 5e-5
    assert learning_rate("classifier", 66_955_010, adapters=False) == 2e-5


@pytest.mark.parametrize(
    ("prompts", "per_step", "size"), [(22_500, 1, 128), (127, 1, 64), (1, 1, 1), (337, 48, 96), (300, 200, 200)]
)
def test_a_batch_has_no_more_samples_than_there_are_prompts(prompts: int, per_step: int, size: int) -> None:
    assert batch_for(prompts, per_step) == size


@pytest.mark.parametrize(("prompts", "per_step"), [(0, 1), (100, 200)])
def test_a_batch_that_there_are_too_few_prompts_for_is_refused(prompts: int, per_step: int) -> None:
    with pytest.raises(ConfigError, match=f"{prompts} samples, one pass over the prompts, are fewer than one batch"):
        batch_for(prompts, per_step)


def test_the_default_mini_batch_fits_every_batch() -> None:
    for batch in range(1, 300):
        size = mini_batch_of(batch, 1)
        assert size == batch if batch <= 128 else size <= 128
        PPOHyperparameters(batch_size=batch, mini_batch_size=size)  # refuses one that does not divide the batch


def test_all_responses_to_a_prompt_fit_into_a_mini_batch() -> None:
    chosen, _ = choose(PPOSettings(responses_per_prompt=6), prompts=50)
    assert (chosen.batch_size, chosen.mini_batch_size) == (126, 126)
    with pytest.raises(ConfigError, match="responses_per_prompt=6 does not divide batch_size=128"):
        choose(PPOSettings(batch_size=128, responses_per_prompt=6))


def test_accumulation_steps_make_a_smaller_mini_batch() -> None:
    chosen, _ = choose(PPOSettings(batch_size=96, gradient_accumulation_steps=4))
    assert chosen.mini_batch_size == 24
    with pytest.raises(ConfigError, match="does not divide batch_size=90"):
        choose(PPOSettings(batch_size=90, gradient_accumulation_steps=4))


def test_a_resumed_run_keeps_what_its_checkpoint_says_also_one_from_before() -> None:
    before = dataclasses.asdict(PPOHyperparameters())
    chosen, line = chosen_ppo(PPOSettings(), before, parameters=10**6, adapters=True, prompts=20)
    assert chosen == PPOHyperparameters()
    assert line == ""
    given, _ = chosen_ppo(PPOSettings(learning_rate=1.0), before, parameters=10**6, adapters=True, prompts=20)
    assert given.learning_rate == 1.0  # which the comparison with the checkpoint refuses


def test_an_open_setting_is_no_difference_from_a_checkpoint_and_a_given_one_is() -> None:
    saved = to_dict(PPOConfig(ppo=PPOHyperparameters(learning_rate=0.5)))
    check_same_run(saved, to_dict(PPOConfig()))
    with pytest.raises(ConfigError, match=r"ppo\.learning_rate: 0\.5 -> 0\.1"):
        check_same_run(saved, to_dict(PPOConfig(ppo=PPOSettings(learning_rate=0.1))))


def test_a_run_from_before_that_left_out_short_texts_is_not_resumed_with_all_of_them() -> None:
    """`tests/test_earlier_versions.py` shows that one with nothing given keeps the checkpoint's value."""
    old = PPOConfig(prompts=PromptSettings(min_text_chars=200))
    check_same_run(to_dict(old), to_dict(PPOConfig()))  # imdb: as ever
    mine = dataclasses.replace(PPOConfig().dataset, data="mine.csv")
    check_same_run(to_dict(dataclasses.replace(old, dataset=mine)), to_dict(PPOConfig(dataset=mine)))
    given = PPOConfig(dataset=mine, prompts=PromptSettings(min_text_chars=0))
    with pytest.raises(ConfigError, match="min_text_chars: 200 -> 0"):
        check_same_run(to_dict(dataclasses.replace(old, dataset=mine)), to_dict(given))


def test_few_prompts_are_passed_over_until_something_can_be_seen() -> None:
    assert [ppo_steps(n) for n in (2, 50, 175)] == [50, 50, 175]


@pytest.mark.parametrize(("examples", "epochs"), [(372, 3.0), (3200, 1.0)])
def test_few_texts_are_passed_over_more_often(examples: int, epochs: float) -> None:
    chosen, line = chosen_optimizer(OptimizerSettings(), {}, "sft", parameters=GPT2, adapters=False, examples=examples)
    assert (chosen.epochs, chosen.learning_rate) == (epochs, 5e-5)
    assert f"optimizer.epochs={epochs:g}" in line


def test_given_settings_of_an_optimizer_stay() -> None:
    given = OptimizerSettings(learning_rate=0.1, epochs=7)
    assert chosen_optimizer(given, {}, "sft", parameters=GPT2, adapters=False, examples=10) == (given, "")
