"""What a program gives to the trainer, checked and completed before anything is computed."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from plaudit.classic.config import PPOConfig
from plaudit.classic.models import PreTrainedModelWrapper
from plaudit.errors import ConfigError

USED_COLUMNS = {"input_ids", "attention_mask", "past_key_values", "label", "query", "response"}
"""Columns that `remove_unused_columns` leaves in a data set."""


def checked_arguments(
    config: object, model: object, ref_model: object, tokenizer: object
) -> tuple[PPOConfig, PreTrainedModelWrapper]:
    """Config and model. Raises `ConfigError` unless all arguments are of the kinds that the trainer takes."""
    if not isinstance(config, PPOConfig):
        raise ConfigError(f"config is a {type(config).__name__}: give a plaudit.classic.PPOConfig")
    if not isinstance(model, PreTrainedModelWrapper):
        raise ConfigError(
            f"model is a {type(model).__name__}: give AutoModelForCausalLMWithValueHead.from_pretrained(…)"
        )
    if ref_model is not None and not isinstance(ref_model, PreTrainedModelWrapper):
        raise ConfigError(f"ref_model is a {type(ref_model).__name__}: give another model with a value head, or None")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: give the model's, from AutoTokenizer")
    return config, model


def give_pad_token(tokenizer: Any) -> None:
    """Makes the end-of-text token the pad token of a tokenizer that has none.

    Raises:
        ConfigError: it has no end-of-text token either.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer has neither a pad token nor an end-of-text token: set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token


def data_loader(dataset: Any, config: PPOConfig, data_collator: Callable[[list[Any]], Any] | None) -> "DataLoader[Any]":
    """Batches of `batch_size` in random order; the last one is left out if it is short.

    Raises:
        ConfigError: there are fewer rows than one batch has.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and config.remove_unused_columns and hasattr(dataset, "remove_columns"):
        dataset = dataset.remove_columns([name for name in columns if name not in USED_COLUMNS])
    if len(dataset) < config.batch_size:
        raise ConfigError(
            f"dataset has {len(dataset)} rows, fewer than batch_size={config.batch_size}: no batch is full"
        )
    return DataLoader(dataset, batch_size=config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True)
