"""Arguments of `generate` and `from_pretrained` as old programs write them, in the form that transformers takes."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

NO_TOKEN = 2**31 - 1
"""A token that no vocabulary has, so that nothing ends a text early."""


def generation_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` as programs write them, in the form that transformers takes today.

    No least length may be -1, `top_k` may be 0.0, and an end-of-text token that no vocabulary has (-1) means no end.
    """
    taken = {k: v for k, v in arguments.items() if not (k in ("min_length", "min_new_tokens") and (v or 0) <= 0)}
    if isinstance(taken.get("top_k"), float):
        taken["top_k"] = int(taken["top_k"])
    if isinstance(taken.get("eos_token_id"), int) and taken["eos_token_id"] < 0:
        taken["eos_token_id"] = NO_TOKEN
    return taken


def loading_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` as programs write them, in the form that transformers takes today.

    `load_in_8bit` and `load_in_4bit` become its `quantization_config`. A device by number is a GPU; on a machine
    without one, `{"": 0}` is the CPU.
    """
    options = dict(options)
    places = options.get("device_map")
    if isinstance(places, dict) and not torch.accelerator.is_available():
        options["device_map"] = {name: "cpu" if isinstance(place, int) else place for name, place in places.items()}
    bits = {name: options.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in options}
    if any(bits.values()):
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
        options.setdefault("device_map", {"": current_device()})
    return options


def current_device() -> str:
    """This process's device, for `device_map`."""
    from accelerate import PartialState

    return str(PartialState().device)
