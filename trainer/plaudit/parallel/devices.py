"""Which device a process computes on, and with what arithmetic."""

import torch

from plaudit.errors import ConfigError


def device_named(name: str | None) -> torch.device:
    """The device of this name; None is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if there else "cpu"))
        if device.type != "cuda":
            torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"device={name!r} can't be used here ({' '.join(str(error).split()):.120})") from error
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(
            f"device={name!r}: torch {torch.__version__} finds {there} GPUs here; pass --device cpu, or leave it out"
        )
    return device


def settle_arithmetic(*, tf32: bool = False) -> None:
    """Sets how GPUs of this process compute: fp32 matrix products in TF32 if `tf32`, and attention without cuDNN.

    cuDNN's attention, torch's first choice on recent GPUs, is not deterministic, and makes a plan for each new shape.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.enable_cudnn_sdp(False)
