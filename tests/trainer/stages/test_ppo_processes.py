"""Several real processes make one run: the numbers of one process, and one end for all of them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.runs import (
    end_of_the_first_when_the_second,
    largest_difference,
    numbers,
    preset_of,
    single_threaded,
    start_ranks,
)
from harness.stub_reward_server import StubRewardServer
from plaudit.data.prompts import PromptSchedule, load_prompts
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.policy.loading import load_policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo

ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "-m"),
)


@pytest.fixture
def config(config: PPOConfig) -> PPOConfig:
    return dataclasses.replace(config, device="cpu")


def prompts_of_step(config: PPOConfig, step: int) -> list[str]:
    prompts = load_prompts(config.dataset, config.prompts, load_tokenizer(config.policy), "train", seed=config.seed)
    assert config.ppo.batch_size is not None
    return PromptSchedule(prompts, config.ppo.batch_size, seed=config.seed).batch(step).texts


# Defect 9: each process whitened its own advantages, and statistics were those of the first one.
EVERYTHING = PPOHyperparameters(
    batch_size=9,
    mini_batch_size=3,
    gradient_accumulation_steps=3,
    learning_rate=1e-3,
    ppo_epochs=2,
    kl_penalty="full",
    entropy_coef=0.01,
    use_score_scaling=True,
    use_score_norm=True,
    whiten_rewards=True,
    max_grad_norm=0.5,
)
WITHOUT_CRITIC = PPOHyperparameters(
    batch_size=18,
    mini_batch_size=9,
    responses_per_prompt=3,
    advantage_estimator="grpo",
    loss_aggregation="sequence_mean",
    kl_loss_coef=0.1,
    cliprange_upper=0.3,
    learning_rate=1e-3,
    ppo_epochs=2,
)
"""Three groups in a mini-batch, which two processes share as two and one."""


def train_with_ranks(config: PPOConfig) -> None:
    for code, stderr in [rank.end() for rank in start_ranks(config, 2)]:
        assert code == 0, stderr


def train_with_accelerate(config: PPOConfig) -> None:
    command = [sys.executable, *ACCELERATE, "plaudit.cli", "ppo", "--config", str(preset_of(config))]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280)


@pytest.mark.parametrize(
    ("train", "hyperparameters"),
    # Everything on, and mini-batches that two can't share evenly.
    [(train_with_ranks, EVERYTHING), (train_with_accelerate, None), (train_with_ranks, WITHOUT_CRITIC)],
)
def test_two_processes_train_as_one_does(
    config: PPOConfig,
    stub_reward_server: StubRewardServer,
    tmp_path: Path,
    train: Callable[[PPOConfig], None],
    hyperparameters: PPOHyperparameters | None,
) -> None:
    if hyperparameters is not None:
        generation = GenerationSettings(top_k=50, temperature=0.8)
        config = dataclasses.replace(config, ppo=hyperparameters, generation=generation)
    alone = dataclasses.replace(config, output_dir=tmp_path / "alone")
    single_threaded(ppo.run, alone)
    seen = stub_reward_server.state["scored"]
    stub_reward_server.reset()
    train(config)
    assert stub_reward_server.state["scored"] == seen, "each response was scored once, by one process"
    of_metrics, of_weights = largest_difference(config.output_dir, alone.output_dir)
    print(f"largest difference between 1 and 2 processes: metrics {of_metrics:.1e}, weights {of_weights:.1e}")
    assert of_metrics < 1e-5
    assert of_weights < 1e-5


REWARD_OF_FIELD = """
import json, os

def of_row(prompts, responses, row):
    with open("seen-" + os.environ.get("RANK", "0") + ".jsonl", "a") as file:
        for seen in zip(prompts, responses, row):
            file.write(json.dumps(seen) + "\\n")
    return [float(number) for number in row]
"""


def test_each_reward_belongs_to_its_prompt_and_field_in_both_processes(
    config: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_of_field.py").write_text(REWARD_OF_FIELD)
    rows = [{"question": f"Question number {i}", "row": i} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config,
        dataset=DataSettings("rows.jsonl"),
        prompts=PromptSettings(column="question", fields=("row",)),
        generation=GenerationSettings(max_new_tokens=4),
        reward=RewardSettings.of(function="reward_of_field:of_row"),
        ppo=dataclasses.replace(config.ppo, batch_size=7, mini_batch_size=7, ppo_epochs=1),
        steps=2,
    )
    train_with_ranks(config)
    seen = [
        [json.loads(line) for line in (tmp_path / f"seen-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]
    assert all(prompt == f"Question number {row}" for of_rank in seen for prompt, _, row in of_rank)
    prompts = load_prompts(config.dataset, config.prompts, load_tokenizer(config.policy), "train", seed=config.seed)
    schedule = PromptSchedule(prompts, 7, seed=config.seed)
    batches = [schedule.batch(step) for step in range(2)]
    # Shares of four and three, in the batch's order.
    assert [row for _, _, row in seen[0]] == [row for batch in batches for row in batch.fields["row"][:4]]
    assert [row for _, _, row in seen[1]] == [row for batch in batches for row in batch.fields["row"][4:]]
    for line, batch in zip(numbers(config.output_dir), batches, strict=True):
        assert line["env/reward_mean"] == pytest.approx(sum(batch.fields["row"]) / 7)


def test_a_process_without_rewards_ends_all_with_its_message_and_exit_code(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    first, second = prompts_of_step(config, 0), prompts_of_step(config, 1)
    only_the_other_ranks = next(text for text in second[4:] if text not in first + second[:4])
    unavailable = {"do": "status", "status": 503, "times": 1000, "when": json.dumps(only_the_other_ranks)}
    stub_reward_server.script([unavailable])
    ends = [rank.end() for rank in start_ranks(config, 2)]
    for code, stderr in ends:
        assert code == 75, stderr
        assert "in process 1 of 2" in stderr
        assert "step-000001 written" in stderr
    stub_reward_server.script([])
    for code, stderr in [rank.end() for rank in start_ranks(config, 2, "--resume", "auto")]:
        assert code == 0, stderr
    assert len(numbers(config.output_dir)) == 3


def test_a_signal_to_one_process_stops_all_after_a_checkpoint(config: PPOConfig) -> None:
    config = dataclasses.replace(config, steps=1000, checkpoint_every=1000)
    ranks = start_ranks(config, 2)
    ranks[0].wait_for_step(1)
    ranks[1].signal(signal.SIGTERM)
    for code, stderr in [rank.end() for rank in ranks]:
        assert code == 143, stderr
        assert "--resume auto" in stderr
    assert list((config.output_dir / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_others_within_the_timeout(
    config: PPOConfig, fate: signal.Signals
) -> None:
    code, stderr = end_of_the_first_when_the_second(fate, config)
    assert code == 1
    assert "another process of this run has ended or does not answer" in stderr
    saved = sorted((config.output_dir / "checkpoints").glob("step-*/manifest.json"))
    assert saved, "the steps before are there to go on from"


def test_a_mini_batch_smaller_than_the_processes_is_refused(policy_dir: Path) -> None:
    policy = load_policy(policy_dir, LoraSettings())
    with pytest.raises(ConfigError, match="mini_batch_size=2 is less than 3 processes"):
        PPOStepper(policy, None, PPOHyperparameters(batch_size=2, mini_batch_size=2), processes=Processes(0, 3))
