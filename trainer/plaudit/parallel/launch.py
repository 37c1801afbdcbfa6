"""What a launcher (`accelerate launch`, `torchrun`) asked for: how many processes, and whether weights are sharded."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from plaudit.errors import ConfigError, PlauditError
from plaudit.parallel.devices import device_named
from plaudit.parallel.processes import Processes
from plaudit.parallel.sharding import Sharding
from plaudit.settings.ppo import PPOConfig

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are."""


class ProcessLost(PlauditError, RuntimeError):
    """Another process of the run has died, or did not answer within the timeout."""


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return max(int(os.environ.get(name, "1")) for name in WORLD_SIZES)


@contextmanager
def process_group(config: PPOConfig) -> Iterator[tuple[Processes, torch.device]]:
    """The processes of this run (`torch.distributed`'s default group), and this one's device, for the block's length.

    No collective operation waits for another process longer than rewards may take plus `collective_timeout_s`.

    Raises:
        ConfigError: the device isn't there, or accelerate's configuration asks for something that can't be had.
        ProcessLost: another process has died or does not answer.
    """
    device = device_named(config.device)
    if world_size() == 1:
        yield Processes(), device
        return
    from accelerate import PartialState

    timeout_s = config.reward.patience_s + config.reward.request_timeout_s + config.collective_timeout_s
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(seconds=timeout_s))
    with _naming_lost_processes():
        sharding = sharding_for(config) if state.num_processes > 1 else None
        yield Processes(state.process_index, state.num_processes, sharding), state.device
    # Not after an error: one that has died would be waited for.
    state.destroy_process_group()


def sharding_for(config: PPOConfig) -> Sharding | None:
    """How accelerate's configuration asks for the weights to be sharded; None for a replica in every process.

    Raises:
        ConfigError: it asks for something that can't be had, or that a setting of the run rules out.
    """
    sharding = _asked_for()
    if sharding is None:
        return None
    quantization = config.model.quantization
    if quantization is not None:
        raise ConfigError(f"model.quantization={quantization} can't be sharded: choose one of the two")
    if config.model.compile:
        raise ConfigError("model.compile=True can't go with sharded weights: choose one of the two")
    if config.generation.static_cache:
        raise ConfigError(
            "generation.static_cache=True can't go with sharded weights, which are gathered anew for every rollout"
        )
    # Otherwise transformers may leave all processes of a machine but one without weights. Each needs them until then.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return sharding


def _asked_for() -> Sharding | None:
    """What accelerate's configuration says about FSDP or DeepSpeed's ZeRO. Raises `ConfigError` for what can't be had.

    FSDP stands in for ZeRO: with resharding after the forward pass for stage 3, without it for stages 1 and 2.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return _of_deepspeed()
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate's configuration asks for FSDP 1; `accelerate to-fsdp2 --config_file FILE --overwrite` turns it "
            "into 2"
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("accelerate's configuration says fsdp_offload_params: true, but weights stay on their device")
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "accelerate's configuration says fsdp_activation_checkpointing: true; say --model.gradient-checkpointing "
            "instead, which is off while text is generated"
        )
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ConfigError("fsdp_auto_wrap_policy: SIZE_BASED_WRAP can't be had; choose TRANSFORMER_BASED_WRAP")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return Sharding(
        reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
        blocks=tuple(name.strip() for name in named.split(",") if name.strip()),
    )


def _of_deepspeed() -> Sharding | None:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("", "none"):
        try:
            zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
            stage = int(zero.get("stage", 0))
            offload = [zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"deepspeed_config_file={file} can't be read: {error}") from error
    else:
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        names = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
        offload = [os.environ.get(name, "none") for name in names]
    if set(map(str.lower, offload)) != {"none"}:
        raise ConfigError(
            "accelerate's configuration has DeepSpeed offload something, but weights stay on their device"
        )
    return None if stage == 0 else Sharding(reshard_after_forward=stage == 3)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo has no error of its own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ProcessLost(
            f"another process of this run has ended or does not answer ({reason:.120}); see its message, and go on "
            "with the same command and --resume auto"
        ) from error
