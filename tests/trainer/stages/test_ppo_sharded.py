"""Weights split over real processes (FSDP): the numbers of one process, whole files, none left waiting."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from harness.runs import (
    assert_same,
    end_of_the_first_when_the_second,
    largest_difference,
    preset_of,
    single_threaded,
    start_ranks,
    weights,
)
from harness.stub_reward_server import StubRewardServer
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[3] / "deploy/accelerate/fsdp.yaml"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NESTED = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block,GPT2MLP"}
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}

# 9 samples in mini-batches of 3, one at a time: the second process has a pass less, and does one for nothing.
UNEVEN = PPOHyperparameters(
    batch_size=9,
    mini_batch_size=3,
    micro_batch_size=1,
    gradient_accumulation_steps=3,
    learning_rate=1e-3,
    ppo_epochs=2,
    max_grad_norm=0.5,
)
# Three groups of 3 in a mini-batch, two samples at a time: three passes in the first process, two in the second.
GROUPS = PPOHyperparameters(
    batch_size=9,
    mini_batch_size=9,
    micro_batch_size=2,
    responses_per_prompt=3,
    advantage_estimator="rloo",
    loss_aggregation="sequence_sum",
    loss_tokens=16,
    kl_loss_coef=0.1,
    learning_rate=1e-3,
    ppo_epochs=2,
)
EVERYTHING_LEARNS = {"lora": LoraSettings(enabled=False), "model": ModelSettings(separate_value_model=True)}


@pytest.fixture
def config(config: PPOConfig) -> PPOConfig:
    return dataclasses.replace(config, ppo=UNEVEN, generation=GenerationSettings(top_k=50), device="cpu")


def train_sharded(config: PPOConfig, environment: dict[str, str], *flags: str) -> None:
    for code, stderr in [rank.end() for rank in start_ranks(config, 2, *flags, environment=environment)]:
        assert code == 0, stderr


@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        pytest.param(FSDP, {}, id="adapters"),
        pytest.param(FSDP, EVERYTHING_LEARNS, id="everything"),
        pytest.param(FSDP, {"model": ModelSettings(gradient_checkpointing=True)}, id="checkpointing"),
        pytest.param(FSDP, {"model": ModelSettings(logits_mib=0.002)}, id="pieces"),
        pytest.param(FSDP, {**EVERYTHING_LEARNS, "model": ModelSettings(logits_mib=0.002)}, id="everything in pieces"),
        pytest.param(
            {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block,GPT2MLP"}, {"merge": True}, id="nested-blocks"
        ),
        pytest.param(ZERO_2, {}, id="zero-2"),
        pytest.param(FSDP, {"ppo": GROUPS, "lora": LoraSettings(enabled=False)}, id="groups-without-critic"),
    ],
)
def test_two_processes_with_half_the_weights_each_train_as_one_does(
    config: PPOConfig, tmp_path: Path, environment: dict[str, str], changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(config, **changes)
    alone = dataclasses.replace(config, output_dir=tmp_path / "alone")
    single_threaded(ppo.run, alone)
    train_sharded(config, environment)
    of_metrics, of_weights = largest_difference(config.output_dir, alone.output_dir)
    print(
        f"largest difference between 1 process and 2 sharded ones: metrics {of_metrics:.1e}, weights {of_weights:.1e}"
    )
    assert of_metrics < 1e-5
    assert of_weights < 1e-5
    if config.merge or not config.lora.enabled:
        AutoModelForCausalLM.from_pretrained(config.output_dir / "merged" if config.merge else config.output_dir)


def test_the_configuration_for_accelerate_shards_on_this_machine_as_on_several_gpus(
    config: PPOConfig, tmp_path: Path
) -> None:
    alone = dataclasses.replace(config, output_dir=tmp_path / "alone", steps=1)
    single_threaded(ppo.run, alone)
    config = dataclasses.replace(config, steps=1)
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPE), "--num_processes", "2")
    end = subprocess.run(
        (*launch, "-m", "plaudit.cli", "ppo", "--config", str(preset_of(config))),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert end.returncode == 0, end.stderr
    assert "weights are sharded: this process holds 0.08 of 0.16 MiB" in end.stdout
    assert max(largest_difference(config.output_dir, alone.output_dir)) < 1e-5


def test_each_process_holds_half_of_the_weights(config: PPOConfig) -> None:
    main, other = start_ranks(dataclasses.replace(config, steps=1), 2, environment=FSDP)
    line = main.wait_for_line("weights are sharded")
    own, everything = map(float, re.findall(r"\d+\.\d+", line))
    assert 0.49 < own / everything < 0.52
    assert [main.end()[0], other.end()[0]] == [0, 0]


def test_a_resumed_run_goes_on_to_the_bit_and_with_whole_weights_too(config: PPOConfig, tmp_path: Path) -> None:
    straight, resumed, unsharded = (dataclasses.replace(config, output_dir=tmp_path / name) for name in "abc")
    train_sharded(straight, FSDP)
    train_sharded(dataclasses.replace(resumed, steps=2), FSDP)
    shutil.copytree(resumed.output_dir, unsharded.output_dir)
    train_sharded(resumed, FSDP, "--resume", "auto")
    assert_same(weights(resumed.output_dir), weights(straight.output_dir))
    single_threaded(ppo.run, dataclasses.replace(unsharded, resume="auto"))
    assert max(largest_difference(unsharded.output_dir, straight.output_dir)) < 1e-5


def test_a_process_without_rewards_ends_all_and_the_checkpoint_is_whole(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    stub_reward_server.script([{"do": "score", "times": 2}, {"do": "status", "status": 503, "times": 1000}])
    for code, stderr in [rank.end() for rank in start_ranks(config, 2, environment=FSDP)]:
        assert code == 75, stderr
        assert "step-00000" in stderr
    stub_reward_server.script([])
    train_sharded(config, FSDP, "--resume", "auto")


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_others_within_the_timeout(
    config: PPOConfig, fate: signal.Signals
) -> None:
    code, stderr = end_of_the_first_when_the_second(fate, config, FSDP)
    assert code == 1
    assert "another process of this run has ended or does not answer" in stderr


def a_full_memory_while_gathering() -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room for the others' parts")

    FSDPModule.unshard = full  # type: ignore[method-assign]


def test_a_process_without_room_for_the_others_parts_says_so_and_ends_the_others(config: PPOConfig) -> None:
    main, other = start_ranks(config, 2, environment=FSDP, before=[None, a_full_memory_while_gathering])
    code, stderr = other.end()
    assert code == 1
    assert "OutOfMemoryError: no room for the others' parts" in stderr
    code, stderr = main.end()
    assert code == 1
    assert "another process of this run has ended or does not answer" in stderr


def test_blocks_that_the_model_does_not_have_are_refused(config: PPOConfig) -> None:
    environment = {**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    for code, stderr in [rank.end() for rank in start_ranks(config, 2, environment=environment)]:
        assert code == 2
        assert "'LlamaDecoderLayer': GPT2LMHeadModel has no such modules" in stderr
