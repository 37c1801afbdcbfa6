"""Load a sequence classifier and run it. The only module of the service that knows torch and transformers.

A model that can't give an honest reward never starts: a head without trained weights, a label that isn't there, a
tokenizer that is missing each end in a `ModelError` that says what to do.
"""

import copy
import logging
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from plaudit.reward_service.engine.batching import Encoded, Logits, ScorerLostError, Text
from plaudit.reward_service.engine.model_files import (
    WEIGHTS_LIKE,
    ModelError,
    content_revision,
    file_stamps,
    model_directory,
)
from plaudit.reward_service.engine.packed import NUMBERED_FROM_PADDING, PackedEncoder, can_pack
from plaudit.reward_service.engine.padded import PaddedModel
from plaudit.reward_service.settings import Settings

CHARS_PER_TOKEN_LIMIT = 64
"""A text is cut to this many characters for each token the model can see, before it is tokenised: a megabyte would
otherwise hold the tokenizer for a second. English has about 4 characters a token."""
FALLBACK_MAX_TOKENS = 512
"""For a model that names no limit of its own."""


def load_scorer(settings: Settings) -> "TransformersScorer":
    """The scorer that `settings` ask for, warmed up. Raises `ModelError`."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    directory = model_directory(settings.model)
    try:
        scorer = TransformersScorer(directory, settings)
    except (OSError, KeyError) as error:
        raise ModelError(f"{settings.model} can't be read: {_one_line(error)}") from error
    if settings.label is not None and settings.label not in scorer.labels:
        raise ModelError(f"{settings.model} has no label {settings.label!r}; its labels are {', '.join(scorer.labels)}")
    scorer.warm_up()
    return scorer


class TransformersScorer:
    """Any Hugging Face sequence classifier: without padding where its family allows, in padded batches elsewhere."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.id = settings.model
        self.dtype = settings.dtype
        before = file_stamps(directory)
        self.revision = content_revision(directory)
        tokenizer, model = _load(directory, settings)
        if file_stamps(directory) != before:
            raise ModelError(f"{settings.model} changed while it was being read; try again when it is complete")
        config = model.config
        self.labels: tuple[str, ...] = tuple(config.id2label[index] for index in range(config.num_labels))
        if len(set(self.labels)) != len(self.labels):
            raise ModelError(f"{settings.model} gives the same name to several labels: {', '.join(self.labels)}")
        self.max_tokens = _max_tokens(config, tokenizer, settings.max_tokens)
        self.truncation_side = settings.truncation_side
        self._devices = [torch.device(name) for name in settings.devices]
        # On a GPU a loop over texts would be bound by kernel launches, so there padding is the cheaper way.
        self.packed = _all_on_cpu(settings) and can_pack(config)
        if self.packed and settings.compile:
            raise ModelError(f"--compile is for padded batches, and {settings.model} runs without padding on a CPU")
        self._deterministic = settings.deterministic
        self._batch_tokens = settings.batch_tokens
        self._takes_type_ids = "token_type_ids" in tokenizer.model_input_names
        # A decoder pools at the last token that isn't padding. Without a padding token it can't tell, so texts of one
        # length share a forward pass and no id counts as padding.
        self._same_length_only = config.pad_token_id is None
        if self._same_length_only:
            config.pad_token_id = -1
        if self.packed:
            self._models: list[Any] = [PackedEncoder(model, int8=settings.dtype == "int8")] * len(self._devices)
        else:
            pad_id, takes = config.pad_token_id, self._takes_type_ids
            self._models = [
                PaddedModel(
                    replica,
                    device,
                    pad_id=pad_id,
                    max_tokens=self.max_tokens,
                    takes_type_ids=takes,
                    compiled=settings.compile,
                )
                for replica, device in zip(_replicas(model, self._devices), self._devices, strict=True)
            ]
        self.replicas = len(self._models)
        self._backend = _fast_backend(tokenizer, self.max_tokens, settings.truncation_side)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Token ids with the tokenizer's own special tokens, cut to `max_tokens` and marked where that happened."""
        limit = self.max_tokens * CHARS_PER_TOKEN_LIMIT
        cut = [_cut(text, limit, self.truncation_side) for text in texts]
        if self._backend is None:
            encodings = [self._encode_slowly(text) for text, _ in cut]
        else:
            inputs = [first if second is None else (first, second) for (first, second), _ in cut]
            encodings = [
                Encoded(encoding.ids, encoding.type_ids if self._takes_type_ids else None, bool(encoding.overflowing))
                for encoding in self._backend.encode_batch_fast(inputs)
            ]
        return [
            Encoded(encoded.ids, encoded.type_ids, True) if shortened else encoded
            for encoded, (_, shortened) in zip(encodings, cut, strict=True)
        ]

    def _encode_slowly(self, text: Text) -> Encoded:
        full = self._tokenizer(*text, verbose=False)["input_ids"]
        encoding = self._tokenizer(*text, truncation=True, max_length=self.max_tokens)
        type_ids = encoding["token_type_ids"] if self._takes_type_ids else None
        return Encoded(encoding["input_ids"], type_ids, len(full) > self.max_tokens)

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        """Logits for each text, in order: the model's own for the text alone, but for rounding (1e-5 in fp32)."""
        rows: dict[int, Logits] = {}
        try:
            for group in self._groups(batch):
                encodings = [batch[index] for index in group]
                logits = self._packed(encodings, replica) if self.packed else self._models[replica](encodings)
                rows |= zip(group, map(tuple, logits.float().tolist()), strict=True)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        except torch.AcceleratorError as error:
            raise ScorerLostError(f"{self._devices[replica]}: {error}") from error
        return [rows[index] for index in range(len(batch))]

    def _groups(self, batch: Sequence[Encoded]) -> list[list[int]]:
        if self._deterministic:
            # Matrix products round differently for different shapes; alone, a text always has the same shape.
            return [[index] for index in range(len(batch))]
        if self._same_length_only and not self.packed:
            by_length: dict[int, list[int]] = {}
            for index, encoded in enumerate(batch):
                by_length.setdefault(len(encoded.ids), []).append(index)
            return list(by_length.values())
        return [list(range(len(batch)))]

    def _packed(self, batch: Sequence[Encoded], replica: int) -> torch.Tensor:
        type_ids = [_type_ids(encoded) for encoded in batch] if self._takes_type_ids else None
        logits: torch.Tensor = self._models[replica]([encoded.ids for encoded in batch], type_ids)
        return logits

    def warm_up(self) -> None:
        """A forward pass, so that the first caller doesn't pay for lazy initialisation, and a broken model shows."""
        try:
            if self.packed:
                self._models[0].warm_up()
            else:
                for model in self._models:
                    model.warm_up(self._batch_tokens)
            rows = self.score(self.encode([("warm up", None), ("warm up the model", None)]), 0)
        except Exception as error:
            raise ModelError(f"{self.id} loads but does not run: {_one_line(error)}") from error
        if len(rows[0]) != len(self.labels):
            raise ModelError(f"{self.id} gives {len(rows[0])} logits for {len(self.labels)} labels")


def _load(directory: Path, settings: Settings) -> tuple[Any, Any]:
    name = settings.model
    if not (directory / "config.json").is_file():
        raise ModelError(f"{name} holds no config.json; give a Hugging Face sequence-classification directory")
    if not any(list(directory.glob(pattern)) for pattern in WEIGHTS_LIKE):
        raise ModelError(f"{name} holds no weights (model.safetensors); give a complete model directory")
    try:
        config = AutoConfig.from_pretrained(directory)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.dtype, torch.float32),
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{name} is not a sequence classifier that can be loaded: {_one_line(error)}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{name} is not a trained sequence classifier: its weights lack {missing}; "
            "train one with `plaudit reward-model` or give another directory"
        )
    # The weights may be a view of the file. Whoever writes another model over it would change this one, or crash it.
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    if settings.dtype == "int8" and not can_pack(config):
        with warnings.catch_warnings():
            # torch points at torchao, whose dynamic quantisation needs a further package for the same arithmetic.
            warnings.simplefilter("ignore")
            model = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig})  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, truncation_side=settings.truncation_side)
    except Exception as error:
        raise ModelError(f"{name} holds no tokenizer that can be loaded: {_one_line(error)}") from error
    return tokenizer, model


def _all_on_cpu(settings: Settings) -> bool:
    return all(torch.device(name).type == "cpu" for name in settings.devices)


def _replicas(model: Any, devices: list[torch.device]) -> list[Any]:
    """One model for each device. Replicas on the CPU share their weights."""
    try:
        return [(model if device.type == "cpu" else copy.deepcopy(model)).to(device).eval() for device in devices]
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--devices {','.join(map(str, devices))} can't be used: {_one_line(error)}") from error


def _type_ids(encoded: Encoded) -> Sequence[int]:
    return encoded.type_ids if encoded.type_ids is not None else [0] * len(encoded.ids)


def _first_position(config: Any) -> int:
    """The RoBERTa families number their positions from the padding id on."""
    return config.pad_token_id + 1 if config.model_type in NUMBERED_FROM_PADDING else 0


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _fast_backend(tokenizer: Any, max_tokens: int, side: str) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.enable_truncation(max_tokens, direction=side)
    return backend


def _max_tokens(config: Any, tokenizer: Any, wanted: int | None) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        positions -= _first_position(config)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 1_000_000]
    limit = min(limits, default=FALLBACK_MAX_TOKENS)
    if wanted is not None and wanted > limit and limits:
        raise ModelError(f"--max-tokens {wanted} is more than the model takes ({limit})")
    return wanted or limit


def _cut(text: Text, limit: int, side: str) -> tuple[Text, bool]:
    first, second = text
    if len(first) <= limit and (second is None or len(second) <= limit):
        return text, False
    piece = slice(limit) if side == "right" else slice(-limit, None)
    return (first[piece], None if second is None else second[piece]), True
