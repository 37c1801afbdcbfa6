"""What stages 1 and 2 share: loading a model to start from, and the arguments of transformers' Trainer."""

from pathlib import Path
from typing import Any, Literal

from trainer.config import ConfigError, OptimizerSettings

Kind = Literal["causal-lm", "classifier"]


def load_pretrained(source: str, kind: Kind, **model_arguments: Any) -> tuple[Any, Any]:
    """Model and tokenizer from a directory or hub id, the tokenizer with a pad token.

    Raises:
        ConfigError: there is no such model; the message says what was tried.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = auto.from_pretrained(source, **model_arguments)
    except (OSError, ValueError) as error:
        what = "directory" if Path(source).exists() else "directory or reachable hub id"
        raise ConfigError(
            f"model={source!r} is not a {what} with a {kind} model and tokenizer ({str(error).splitlines()[0]:.200}); "
            "name another, or pass --from-scratch"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


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
