"""Writing a model directory whole: everything into a directory beside it, then one rename a file."""

import shutil
from pathlib import Path
from typing import Any

import torch


def save_model_directory(model: Any, tokenizer: Any, directory: Path, *, half_precision: bool) -> None:
    """Save a plain Hugging Face directory: config, safetensors, tokenizer. An interrupted save leaves the old files."""
    beside = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.float16 if half_precision else model.dtype).save_pretrained(beside, safe_serialization=True)
    tokenizer.save_pretrained(beside)
    directory.mkdir(parents=True, exist_ok=True)
    # The config last: a directory without it is no model directory.
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(directory / file.name)
    beside.rmdir()
