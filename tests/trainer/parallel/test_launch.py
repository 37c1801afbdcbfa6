"""What accelerate's configuration asks for is done or refused, and the device is the one that was asked for."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.errors import ConfigError
from plaudit.parallel.launch import WORLD_SIZES, process_group, sharding_for, world_size
from plaudit.parallel.processes import Processes
from plaudit.parallel.sharding import Sharding
from plaudit.settings.policy import GenerationSettings, ModelSettings
from plaudit.settings.ppo import PPOConfig

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (FSDP, Sharding()),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(reshard_after_forward=False)),
        ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B"}, Sharding(blocks=("A", "B"))),
        (ZERO_2, Sharding(reshard_after_forward=False)),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Sharding()),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, None),
    ],
)
def test_what_accelerates_configuration_asks_for(
    environment: dict[str, str], expected: Sharding | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding_for(PPOConfig()) == expected
    # Every process needs the weights that it is about to split.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == ("true" if expected is None else "false")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, "accelerate to-fsdp2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--model.gradient-checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload"),
        ({**ZERO_2, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"}, "missing.json can't be read"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (FSDP | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        sharding_for(PPOConfig())


def test_a_deepspeed_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}))
    assert sharding_for(PPOConfig()) == Sharding()
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}))
    with pytest.raises(ConfigError, match="offload"):
        sharding_for(PPOConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSettings(quantization="4bit")}, "model.quantization=4bit"),
        ({"model": ModelSettings(compile=True)}, "model.compile=True"),
        ({"generation": GenerationSettings(static_cache=True)}, "generation.static_cache=True"),
    ],
)
def test_settings_that_do_not_go_with_sharded_weights_are_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        sharding_for(dataclasses.replace(PPOConfig(), **changes))


def test_without_a_launcher_there_is_one_process_on_the_device_that_was_asked_for() -> None:
    with process_group(PPOConfig(device="meta")) as (processes, device):
        assert (processes, device) == (Processes(), torch.device("meta"))


@pytest.mark.parametrize("launcher", WORLD_SIZES)
def test_every_launcher_is_asked_how_many_processes_it_started(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size() == 1
    monkeypatch.setenv(launcher, "3")
    assert world_size() == 3
