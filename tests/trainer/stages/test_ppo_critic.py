"""Runs with a critic of their own, and with steps that train the critic alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from harness.runs import assert_same, assert_same_run, largest_difference, numbers, start_ranks, weights
from harness.tiny_models import VOCAB_SIZE, tiny_tokenizer, tiny_wordpiece_tokenizer
from plaudit.errors import ConfigError
from plaudit.settings.policy import LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import ppo


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A decoder reward model with the policy's vocabulary, smaller than the policy."""
    torch.manual_seed(3)
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB_SIZE, num_labels=1, pad_token_id=0, **shape))
    model.save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


@pytest.fixture
def config(config: PPOConfig) -> PPOConfig:
    return dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, value_warmup_steps=2))


CRITICS: dict[str, dict[str, Any]] = {
    "shared": {},
    "all parameters, shared": {"lora": LoraSettings(enabled=False)},
    "judge": {"model": ModelSettings(value_model="judge")},
    "judge with adapters": {"model": ModelSettings(value_model="judge", value_model_lora=True)},
}

FAST = ("shared", "judge with adapters")


def with_critic(config: PPOConfig, critic: str, judge: Path) -> PPOConfig:
    config = dataclasses.replace(config, **CRITICS[critic])
    if config.model.value_model != "judge":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, value_model=str(judge)))


def of_the_policy(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(directory).items() if "value" not in name.split("/")[0]}


@pytest.mark.parametrize(
    "critic", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CRITICS]
)
def test_the_policy_stays_in_the_warm_up_and_moves_after_it_and_a_resumed_run_ends_the_same(
    critic: str, config: PPOConfig, judge: Path, tmp_path: Path
) -> None:
    config = with_critic(config, critic, judge)
    runs = {}
    for steps in (1, 2, 3):
        runs[steps] = ppo.run(dataclasses.replace(config, steps=steps, output_dir=tmp_path / f"{steps}")).output_dir
    assert_same(of_the_policy(runs[2]), of_the_policy(runs[1]))
    one, other = weights(runs[1]), weights(runs[2])
    assert any(not torch.equal(one[name], other[name]) for name in one), "the critic learns"
    moved, before = of_the_policy(runs[3]), of_the_policy(runs[2])
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
    records = numbers(runs[3])
    assert [record["objective/kl_coef"] for record in records] == [config.ppo.init_kl_coef] * 3
    assert [record["objective/kl"] for record in records] == [0.0] * 3, "each rollout came from the policy's start"
    assert records[1]["ppo/policy/ratio_drift"] < 1e-5

    ppo.run(dataclasses.replace(config, steps=1))
    ppo.run(dataclasses.replace(config, steps=3, resume="auto"))
    assert_same_run(config.output_dir, runs[3])


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "judge with adapters"])
def test_two_processes_train_a_critic_as_one_does(critic: str, config: PPOConfig, judge: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(with_critic(config, critic, judge), device="cpu")
    alone = ppo.run(dataclasses.replace(config, output_dir=tmp_path / "alone")).output_dir
    for code, stderr in [rank.end() for rank in start_ranks(config, 2)]:
        assert code == 0, stderr
    of_metrics, of_weights = largest_difference(config.output_dir, alone)
    assert of_metrics < 1e-5
    assert of_weights < 1e-5


def test_a_critic_with_another_vocabulary_ends_the_run_before_its_first_step(config: PPOConfig, judge: Path) -> None:
    tiny_wordpiece_tokenizer().save_pretrained(judge)
    with pytest.raises(ConfigError, match="another vocabulary than the policy"):
        ppo.run(with_critic(config, "judge", judge))


def test_the_earlier_name_of_a_copy_still_works_and_says_the_new_one(
    config: PPOConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, steps=1)
    earlier = dataclasses.replace(config, model=ModelSettings(separate_value_model=True))
    new = dataclasses.replace(
        config, model=ModelSettings(value_model="copy"), output_dir=config.output_dir.with_name("new")
    )
    ppo.run(earlier)
    assert "model.separate_value_model is model.value_model=copy now" in capsys.readouterr().out
    assert_same_run(earlier.output_dir, ppo.run(new).output_dir)
