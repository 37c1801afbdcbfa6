"""Load a classifier and its tokenizer, or raise `ModelError`: no default of a library may stand in for a missing part.

transformers replaces what it doesn't find: a head by random numbers, a vocabulary by five special tokens, an unknown
class by a known one. The loaded model is therefore compared with what the files hold.

Failure modes: a model that loads and scores, and isn't the one that was trained.
"""

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from plaudit.reward_service.engine.model_files import (
    WEIGHTS_LIKE,
    ModelError,
    ModelSource,
    holds,
    how_to_merge,
)
from plaudit.reward_service.settings import Settings

FALLBACK_MAX_TOKENS = 512
"""The limit of a model that declares none."""
NO_LIMIT = 1_000_000
"""transformers writes a limit above this where there is none."""
UNUSED_BUFFERS = ("position_ids", "inv_freq", "masked_bias", "attn.bias", "attention.bias", "num_batches_tracked")
"""Suffixes of buffers that older files hold and newer classes compute."""
MERGED_WITHIN = 1e-3
"""How far adapters may move a logit by being added to the weights: rounding is a thousandth of that."""
LONGEST_QUOTE = 200
"""Characters quoted of another library's message."""
HOW_TO_SAVE_A_TOKENIZER = "copy the files of the tokenizer that the model was trained with (save_pretrained) there"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A classifier on the CPU, in evaluation mode and in its number format (int8: still fp32), and its tokenizer."""

    model: Any
    tokenizer: Any
    labels: tuple[str, ...]
    max_tokens: int
    pad_id: int | None
    """The model's padding token; None if it has none, or the token has no embedding."""
    takes: tuple[str, ...]
    """The inputs that the model takes, of input_ids, attention_mask and token_type_ids, in this order."""


def read_model(source: ModelSource, settings: Settings) -> Loaded:
    """The model of `source`, as `settings` describe. Raises `ModelError`."""
    name = settings.model
    _check_files(name, source)
    model = _with_adapters(source, settings) if source.base is not None else _whole_model(source.directory, settings)
    config = model.config
    labels = _labels(name, config)
    # The weights may be mapped from the file: writing another model over it would change or crash this one.
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    _check_finite(name, model, settings.dtype)
    tokenizer, directory = _tokenizer(source, settings)
    rows = _embedding_rows(model)
    _check_vocabulary(name, directory, tokenizer, rows)
    pad_id = getattr(config.get_text_config(), "pad_token_id", None)
    return Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        labels=labels,
        max_tokens=_max_tokens(model, tokenizer, settings),
        pad_id=pad_id if pad_id is not None and 0 <= pad_id < (rows or pad_id + 1) else None,
        takes=_takes(model, tokenizer),
    )


def _check_files(name: str, source: ModelSource) -> None:
    directory = source.base or source.directory
    shown = name if source.base is None else f"{source.base} (the base model of {name})"
    if not (directory / "config.json").is_file():
        raise ModelError(f"{shown} holds no config.json; give a Hugging Face sequence-classification directory")
    if not holds(directory, WEIGHTS_LIKE):
        raise ModelError(f"{shown} holds no weights (model.safetensors); give a complete model directory")


def _whole_model(directory: Path, settings: Settings) -> Any:
    name = settings.model
    model, report = _from_files(name, directory, None, DTYPES.get(settings.dtype, torch.float32))
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{name} is not a trained sequence classifier: its weights lack {missing}; "
            "train one with `plaudit reward-model` or give another directory"
        )
    return model


def _from_files(name: str, directory: Path, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The classifier of a directory, and transformers' report. Raises `ModelError` for weights that don't fit."""
    try:
        # No code from the directory is run. Without this argument, transformers asks for permission at the terminal.
        config = config or AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ModelError(
                f"{name} is of the family {config.model_type}, of which transformers has no sequence classifier; train "
                "a judge of another family with `plaudit reward-model`"
            )
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} is not a sequence classifier that can be loaded: {one_line(error)}; train one with "
            "`plaudit reward-model` or give another directory"
        ) from error
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{name} has weights that don't fit its config.json: {key} is {_shape(found)} in the file and "
            f"{_shape(wanted)} by the configuration; put the config.json there that the weights were saved with"
        )
    inside = f"{model.base_model_prefix}."
    ignored = [
        key
        for key in sorted(report["unexpected_keys"])
        if key.startswith(inside) and not key.endswith(UNUSED_BUFFERS) and not key.startswith(f"{inside}pooler.")
    ]
    if ignored:
        raise ModelError(
            f"{name} holds weights that a {type(model).__name__} doesn't have ({', '.join(ignored[:3])}), so it was "
            "trained as another architecture; give the directory of a plain transformers classifier"
        )
    return model, report


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _with_adapters(source: ModelSource, settings: Settings) -> Any:
    """The base model with the adapters merged into its weights, and with the head that was trained with them."""
    name = settings.model
    assert source.base is not None
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError:
        raise ModelError(
            f"{name} holds adapters, and peft is not installed: pip install 'plaudit[adapters]', or "
            f"{how_to_merge(name)}"
        ) from None
    try:
        adapter_config = PeftConfig.from_pretrained(source.directory)
        saved = load_peft_weights(source.directory, device="cpu")
    except Exception as error:
        raise ModelError(f"{name} holds adapters that can't be read: {one_line(error)}") from error
    if adapter_config.is_prompt_learning:
        raise ModelError(
            f"{name} holds adapters of type {adapter_config.peft_type.value}, which can't be added to a model's "
            "weights; train LoRA adapters, or a whole model with `plaudit reward-model`"
        )
    trained = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in saved.items()}
    model, missing = _base_model(source, name, trained)
    if missing - trained.keys():
        raise ModelError(
            f"{name} is not a trained sequence classifier: neither its adapters nor their base model {source.base} "
            f"hold {', '.join(sorted(missing - trained.keys())[:3])}; name the head in modules_to_save, train and save "
            "again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights are only a warning there; they are checked below
            adapted = PeftModel.from_pretrained(model, source.directory)
        lacking = sorted(get_peft_model_state_dict(adapted).keys() - saved.keys())
        if lacking:
            raise ValueError(f"the adapters' file lacks {', '.join(lacking[:3])}")
        before = _probe(adapted)
        model = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelError(
            f"{name} holds adapters that don't fit their base model {source.base}: {one_line(error)}; give the base "
            "model that they were trained on"
        ) from error
    if before is not None and not torch.allclose(before, _probe(model), atol=MERGED_WITHIN, rtol=MERGED_WITHIN):
        raise ModelError(
            f"{name} holds adapters that can't be added to the weights of their base model: the sum judges otherwise "
            "than base and adapters, because layers share a weight or a weight is read without a call of its layer; "
            "train adapters on other layers (target_modules), or a whole model with `plaudit reward-model`"
        )
    model.to(DTYPES.get(settings.dtype, torch.float32))
    return model


@torch.inference_mode()
def _probe(model: Any) -> Any:
    """Logits for a few tokens; None of a model that can't judge them, which is told when it is asked for scores."""
    end = model.config.get_text_config().eos_token_id
    ids = [*range(5, 13), *([end] if isinstance(end, int) else [])]
    try:
        return model.eval()(input_ids=torch.tensor([ids])).logits
    except Exception:
        return None


def _base_model(source: ModelSource, name: str, trained: dict[str, tuple[int, ...]]) -> tuple[Any, set[str]]:
    """The base model as a classifier with as many labels as the adapters' head, and the weights that it lacks."""
    assert source.base is not None
    described = source.directory if (source.directory / "config.json").is_file() else source.base
    try:
        config = AutoConfig.from_pretrained(described, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{name}: {described}/config.json can't be read: {one_line(error)}") from error
    model, report = _from_files(name, source.base, config, torch.float32)
    missing = set(report["missing_keys"])
    parameters = dict(model.named_parameters())
    rows = {
        trained[key][0]
        for key in missing & trained.keys()
        if len(parameters[key]) == config.num_labels and trained[key][0] != config.num_labels
    }
    if len(rows) == 1:
        config.num_labels = rows.pop()
        model, report = _from_files(name, source.base, config, torch.float32)
    return model, missing


def _labels(name: str, config: Any) -> tuple[str, ...]:
    """The names of the logits, in order. A whole number becomes its decimal name; other values are refused."""
    names = config.id2label
    if sorted(names) != list(range(config.num_labels)):
        raise ModelError(
            f"{name} names the labels {', '.join(map(str, sorted(names)))} (id2label in config.json), and its logits "
            f"are 0 to {config.num_labels - 1}; give each logit one name"
        )
    labels = []
    for index in range(config.num_labels):
        label = names[index]
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ModelError(
                f"{name} calls logit {index} {label!r} (id2label in config.json); give it a name in quotes"
            )
        labels.append(str(label))
    if len(set(labels)) != len(labels):
        raise ModelError(f"{name} gives the same name to several labels: {', '.join(labels)}")
    other_way = config.label2id if isinstance(config.label2id, dict) else {}
    for index, label in enumerate(labels):
        stated = other_way.get(label, index)
        if str(stated) != str(index):
            raise ModelError(
                f"{name} contradicts itself: label {label} is logit {index} by id2label and logit {stated} by "
                "label2id; correct config.json"
            )
    return tuple(labels)


def _check_finite(name: str, model: Any, dtype: str) -> None:
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            what = "NaN" if tensor.isnan().any() else f"infinity in {dtype}"
            remedy = "" if dtype != "fp16" else "; try --dtype bf16 or fp32"
            raise ModelError(f"{name} can't score: its weights hold {what} ({key}); train it again{remedy}")


def _tokenizer(source: ModelSource, settings: Settings) -> tuple[Any, Path]:
    """The tokenizer in the model's directory; for adapters without one, their base model's."""
    directory = source.directory
    if source.base is not None and not (directory / "tokenizer_config.json").is_file():
        directory = source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, truncation_side=settings.truncation_side, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"{settings.model} holds no tokenizer that can be loaded: {one_line(error)}; {HOW_TO_SAVE_A_TOKENIZER}"
        ) from error
    return tokenizer, directory


def _embedding_rows(model: Any) -> int | None:
    try:
        rows: int = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None  # CANINE hashes characters; Perceiver and others embed differently
    return rows


def _check_vocabulary(name: str, directory: Path, tokenizer: Any, rows: int | None) -> None:
    """Require that its files exist, that it has words, and that the embedding has a row for each of its tokens."""
    kind = type(tokenizer).__name__
    files = dict(getattr(tokenizer, "vocab_files_names", {}))
    present = {file for file in files.values() if (directory / file).is_file()}
    alone = [*directory.glob("tokenizer.*json"), directory / "tokenizer.model", directory / "tekken.json"]
    if files and not present and not any(path.is_file() for path in alone):
        raise ModelError(
            f"{name} holds no vocabulary for its tokenizer, a {kind}: there is no "
            f"{' and no '.join(sorted(files.values()))} in {directory}, and without one all words are the same to the "
            f"model; {HOW_TO_SAVE_A_TOKENIZER}"
        )
    vocabulary = tokenizer.get_vocab()
    if files and len(vocabulary.keys() - set(tokenizer.all_special_tokens)) < 2:
        raise ModelError(
            f"{name} has a tokenizer, a {kind}, that knows no words, only {len(vocabulary)} special tokens; "
            f"{HOW_TO_SAVE_A_TOKENIZER}"
        )
    if rows is None:
        return
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        raise ModelError(
            f"{name} has a tokenizer with {len(vocabulary)} tokens and a model with an embedding for {rows}: "
            f"{token!r} (id {index}){' and others' * (len(beyond) > 1)} would have none. Save the tokenizer that the "
            "model was trained with, or give the model its rows (resize_token_embeddings) and train them"
        )


def _takes(model: Any, tokenizer: Any) -> tuple[str, ...]:
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes = ["input_ids"]
    if "attention_mask" in parameters or anything:
        takes.append("attention_mask")
    if "token_type_ids" in parameters and "token_type_ids" in tokenizer.model_input_names:
        takes.append("token_type_ids")
    return tuple(takes)


def _max_tokens(model: Any, tokenizer: Any, settings: Settings) -> int:
    candidates = (*_positions(model), tokenizer.model_max_length)
    limits = [limit for limit in candidates if isinstance(limit, int | float) and 0 < limit < NO_LIMIT]
    limit = int(min(limits, default=FALLBACK_MAX_TOKENS))
    wanted = settings.max_tokens
    if wanted is not None and wanted > limit and limits:
        raise ModelError(f"--max-tokens {wanted} is more than the model takes ({limit})")
    added = 0 if settings.join == "chat" else tokenizer.num_special_tokens_to_add(settings.join == "pair")
    if (wanted or limit) <= added:
        raise ModelError(
            f"--max-tokens {wanted or limit} leaves no room for text beside the {added} tokens that the tokenizer of "
            f"{settings.model} adds"
        )
    return wanted or limit


def _positions(model: Any) -> list[Any]:
    """The number of positions that the model has, by its configuration and by its embeddings.

    An embedding with a padding row, as in RoBERTa's family, counts positions from the row after that one.
    """
    config = model.config.get_text_config()
    declared = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    numbered = [
        table.weight.shape[0] - table.padding_idx - 1
        for path, table in model.named_modules()
        if path.rpartition(".")[2] == "position_embeddings" and getattr(table, "padding_idx", None) is not None
    ]
    return [*declared, *numbered]


def one_line(error: Exception) -> str:
    """The error's type and the first line of its message, or the message's beginning if that line ends with a colon."""
    lines = str(error).strip().splitlines() or ["no message"]
    said = lines[0] if not lines[0].rstrip().endswith(":") else " ".join(str(error).split())[:LONGEST_QUOTE]
    return f"{type(error).__name__}: {said}"
