"""What stages 1 and 2 share: the arguments of transformers' Trainer, and writing a model directory whole."""

import shutil
from pathlib import Path
from typing import Any

import torch

from plaudit.settings.supervised import OptimizerSettings


def training_arguments(output_dir: Path, optimizer: OptimizerSettings, seed: int) -> dict[str, Any]:
    """The settings of transformers' TrainingArguments that both stages use."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": optimizer.batch_size,
        "num_train_epochs": optimizer.epochs,
        "max_steps": optimizer.max_steps or -1,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(optimizer.schedule, optimizer.schedule),
        "warmup_steps": optimizer.warmup_fraction,
        "max_grad_norm": optimizer.max_grad_norm,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "seed": seed,
    }


def save_model_directory(model: Any, tokenizer: Any, directory: Path, *, half_precision: bool) -> None:
    """Save a plain Hugging Face directory: config, safetensors, tokenizer. An interrupted save leaves the old files."""
    beside = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.to(torch.float16 if half_precision else model.dtype).save_pretrained(beside, safe_serialization=True)
    tokenizer.save_pretrained(beside)
    directory.mkdir(parents=True, exist_ok=True)
    # The config last: a directory without it is no model directory.
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
        file.chmod(0o644)  # safetensors writes for its owner alone; a container's user has to read them too
        file.replace(directory / file.name)
    beside.rmdir()
