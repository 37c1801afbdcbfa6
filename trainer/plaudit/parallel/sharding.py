"""Weights split over processes (FSDP): each keeps a part of every tensor, its gradient and its optimizer state.

What would be wrong here: an average of gradients where a sum is meant, a process that computes a pass more than the
others, who would wait for it for good, or a file with a part of the weights in it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from plaudit.errors import ConfigError
from plaudit.policy.model import Policy, PolicyWeights
from plaudit.settings.ppo import PPOConfig


@dataclass(frozen=True)
class Sharding:
    """How `accelerate launch` was asked to split the weights."""

    reshard_after_forward: bool = True
    """Drop the others' parts after a forward pass and gather them again for the backward pass."""
    blocks: tuple[str, ...] = ()
    """Classes of the modules that are gathered as one; empty for the blocks the model itself names."""


def sharding_for(config: PPOConfig) -> Sharding | None:
    """What accelerate's configuration asks for; None for whole weights in every process.

    Raises `ConfigError` for settings that can't go together.
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

    ZeRO is done by the same means: stage 3 as FSDP that reshards after the forward pass, 1 and 2 as FSDP that doesn't.
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


@dataclass(frozen=True)
class ShardedPolicy:
    """A policy whose weights, and its reference's, are split over the processes."""

    policy: Policy
    sharding: Sharding

    def __str__(self) -> str:
        parameters = [parameter for root in self._roots for parameter in root.parameters()]
        own, everything = (
            sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
            for tensors in ([p.to_local() for p in parameters if isinstance(p, DTensor)], parameters)
        )
        return f"weights are sharded: this process holds {own:,.2f} of {everything:,.2f} MiB, and all during rollouts"

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Around a rollout: every process holds all weights, so that none waits for another at each token."""
        roots, blocks = self._units()
        try:
            for unit in (*roots, *blocks):
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            yield
            for root in roots:
                # PyTorch notes every pass for the backward pass to come, which a reference never has. (It has had no
                # way to forget them for long.)
                if hasattr(root, "reset_iter_state"):
                    root.reset_iter_state()
        finally:
            for unit in (*roots, *blocks):
                unit.reshard()
            for block in blocks:
                block.set_reshard_after_forward(self.sharding.reshard_after_forward, recurse=False)

    def _units(self) -> tuple[list[FSDPModule], list[FSDPModule]]:
        units = [module for root in self._roots for module in root.modules() if isinstance(module, FSDPModule)]
        return [unit for unit in units if unit in self._roots], [unit for unit in units if unit not in self._roots]

    @property
    def _roots(self) -> list[nn.Module]:
        return [*self.policy.transformers, self.policy.v_head]


def shard(policy: Policy, sharding: Sharding) -> ShardedPolicy:
    """Splits all weights of the policy and its reference over all processes, in place.

    Every process must hold the same weights. Build the optimizer afterwards: the parameters are other objects.
    """
    everybody = dist.group.WORLD
    assert everybody is not None
    mesh = DeviceMesh.from_group(everybody, policy.device.type)
    for transformer in policy.transformers:
        names = sharding.blocks or tuple(transformer._no_split_modules or ())
        # From the inside out.
        blocks = [module for module in transformer.modules() if type(module).__name__ in names][::-1]
        if not blocks:
            kind = type(transformer).__name__
            raise ConfigError(f"fsdp_transformer_layer_cls_to_wrap={','.join(names)!r}: {kind} has no such modules")
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    for root in (*policy.transformers, policy.v_head):
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                # The loss is already a mean over the whole mini-batch: gradients are summed.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return ShardedPolicy(policy, sharding)


def is_sharded(policy: Policy) -> bool:
    """Whether `shard` has been there."""
    return isinstance(policy.v_head, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may hold a part; then all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def for_files(tensor: Tensor) -> Tensor:
    """A tensor as the first process writes it: whole, and on the CPU if it was split; the others get an empty one then.

    All processes must call this.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    everything = tensor.full_tensor()
    return everything.cpu() if tensor.device_mesh.get_rank() == 0 else everything.new_empty(0)


def as_split(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all of them have, if `like` is one that is split."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(policy: Policy) -> PolicyWeights:
    """What a sharded policy is saved from. All processes must call this, and the first gets it."""

    def of(module: nn.Module, *, learning: bool = False) -> dict[str, Tensor]:
        held = module.state_dict(keep_vars=True)
        # Tied weights stay one tensor, which is written once.
        once = {id(t): for_files(t.detach()) for t in held.values() if t.requires_grad or not learning}
        return {name: once[id(tensor)] for name, tensor in held.items() if id(tensor) in once}

    return PolicyWeights(
        # Of a model with adapters, its base is not written.
        model=of(policy.model, learning=policy.has_adapters),
        value_head=of(policy.v_head),
        value_model={} if policy.value_model is None else of(policy.value_model),
    )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
