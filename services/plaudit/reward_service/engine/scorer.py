"""A loaded sequence classifier that scores texts: without padding, in padded batches, by length or one by one.

A model whose rewards would be wrong is refused with a `ModelError` that says what to do: `loading` checks its files,
`self_check` its scores.
"""

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

from plaudit.reward_service.engine.batching import (
    CHARS_PER_TOKEN_LIMIT,
    Chat,
    Encoded,
    Logits,
    Plain,
    ScorerLostError,
    TemporaryOutOfMemory,
    Text,
)
from plaudit.reward_service.engine.chat import ChatTemplate
from plaudit.reward_service.engine.loading import Loaded, one_line, read_model
from plaudit.reward_service.engine.model_files import ModelError, with_template
from plaudit.reward_service.engine.model_source import ModelOrigins, pinned_files
from plaudit.reward_service.engine.packed import PackedEncoder, can_pack
from plaudit.reward_service.engine.padded import PaddedModel
from plaudit.reward_service.engine.self_check import WORDS, BatchingMode, check_scores
from plaudit.reward_service.settings import Settings
from plaudit.wire.revisions import content_revision

NO_MEMORY_ON_CPU = "DefaultCPUAllocator"
"""The name in torch's RuntimeError when an allocation on the CPU fails."""


def load_scorer(settings: Settings, origins: ModelOrigins | None = None) -> "TransformersScorer":
    """The scorer that `settings` describe, warmed up and checked. Raises `ModelError`.

    `origins` are the places that were resolved at start, so that a reload reads the same ones.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    devices = _devices(settings)
    source = (origins or ModelOrigins(settings.model, settings.revision)).files()
    try:
        with pinned_files(source) as files:
            revision = content_revision(*files.directories)
            loaded = read_model(files, settings)
            if settings.chat_template is not None:
                loaded.tokenizer.chat_template = template = _template_in(settings.chat_template)
                revision = with_template(revision, template)
    except (OSError, KeyError) as error:
        raise ModelError(f"{settings.model} can't be read: {one_line(error)}") from error
    if settings.label is not None and settings.label not in loaded.labels:
        raise ModelError(f"{settings.model} has no label {settings.label!r}; its labels are {', '.join(loaded.labels)}")
    scorer = TransformersScorer(loaded, revision, devices, settings)
    scorer.run_self_check()
    return scorer


class TransformersScorer:
    """Any Hugging Face sequence classifier: without padding if its family is known, else in padded batches."""

    batching: BatchingMode
    packed: bool
    """Whether a batch costs the sum of its lengths (no padding) rather than rows times the longest."""
    checked: Mapping[str, object]
    """What the start-up check found, for the log."""

    def __init__(self, loaded: Loaded, revision: str, devices: Sequence[torch.device], settings: Settings) -> None:
        self.id = settings.model
        self.dtype = settings.dtype
        self.revision = revision
        self.labels = loaded.labels
        self.max_tokens = loaded.max_tokens
        self.truncation_side = settings.truncation_side
        self.replicas = len(devices)
        self._settings = settings
        self._devices = list(devices)
        self._deterministic = settings.deterministic
        self._takes_type_ids = "token_type_ids" in loaded.takes
        self.tokenizer = loaded.tokenizer
        self._template: ChatTemplate | None = None
        if settings.join == "chat":
            self._template = ChatTemplate(
                loaded.tokenizer, self.id, max_tokens=self.max_tokens, truncation_side=self.truncation_side
            )
        self._backend = self._fast_backend()
        if self._template is not None:
            self._template.require_room(self._tokenized, self.id)
        self._loaded: Loaded | None = loaded
        self._models: list[Any] = []
        # On a GPU, attention for each text alone would be bound by kernel launches: padding is cheaper there.
        if all(device.type == "cpu" for device in devices) and can_pack(loaded.model):
            if settings.compile:
                raise ModelError(f"--compile is for padded batches, and {self.id} runs without padding on a CPU")
            self.use("packed")
        else:
            self.use("padded" if loaded.pad_id is not None else "by length")

    def run_self_check(self) -> None:
        """Check the model's scores, and choose how it is batched. Call it once. Raises `ModelError`."""
        assert self._loaded is not None
        self.checked = check_scores(self, self._loaded, self._settings, self._devices[0])
        self._loaded = None
        self.__dict__.pop("modules", None)  # those in use are held by `_models`
        if self._devices[0].type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def modules(self) -> list[Any]:
        """The transformers model of each replica, on its device."""
        assert self._loaded is not None
        loaded = self._loaded
        if loaded.pad_id is None:
            # A decoder pools at the last token that isn't padding, and refuses batches without a padding token. The
            # texts of a batch then have one length, so an id that no token has works.
            loaded.model.config.get_text_config().pad_token_id = -1
        return _replicas(_quantised(loaded.model) if self.dtype == "int8" else loaded.model, self._devices)

    def use(self, batching: BatchingMode) -> None:
        """Switch to this way of batching, and warm up. Raises `ModelError` when the model doesn't run."""
        assert self._loaded is not None
        loaded = self._loaded
        self.batching, self.packed = batching, batching == "packed"
        if batching == "packed":
            packed = PackedEncoder(loaded.model, int8=self.dtype == "int8")
            packed.warm_up()
            self._models = [packed] * self.replicas
            return
        self._models = [
            PaddedModel(
                module,
                device,
                pad_id=loaded.pad_id if batching == "padded" and loaded.pad_id is not None else -1,
                max_tokens=self.max_tokens,
                takes_type_ids=self._takes_type_ids,
                takes_mask="attention_mask" in loaded.takes,
                compiled=self._settings.compile,
            )
            for module, device in zip(self.modules, self._devices, strict=True)
        ]
        try:
            for model in self._models:
                model.warm_up(self._settings.batch_tokens)
        except Exception as error:
            raise ModelError(f"{self.id} loads but does not run: {one_line(error)}") from error

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Token ids with the tokenizer's own special tokens, or the chat template's in their place.

        They are cut to `max_tokens` and marked where that happened.
        """
        if self._template is not None:
            return self._template.encode(texts, self._tokenized)
        return self._tokenized([text for text in texts if not isinstance(text, Chat)])

    def example(self) -> list[str] | None:
        """The tokens of a short conversation as the chat template writes it; None without one. For the log."""
        if self._template is None:
            return None
        [encoded] = self.encode([Chat((("user", "good"), ("assistant", "story")))])
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(encoded.ids)]

    def _tokenized(self, texts: Sequence[Plain]) -> list[Encoded]:
        limit = self.max_tokens * CHARS_PER_TOKEN_LIMIT
        cut = [_cut(text, limit, self.truncation_side) for text in texts]
        if self._backend is None:
            encodings = [self._encode_slowly(text) for text, _ in cut]
        else:
            inputs = [first if second is None else (first, second) for (first, second), _ in cut]
            encodings = [
                Encoded(encoding.ids, encoding.type_ids if self._takes_type_ids else None, bool(encoding.overflowing))
                for encoding in self._backend.encode_batch_fast(inputs, add_special_tokens=self._template is None)
            ]
        return [
            Encoded(encoded.ids, encoded.type_ids, True) if shortened else encoded
            for encoded, (_, shortened) in zip(encodings, cut, strict=True)
        ]

    def _encode_slowly(self, text: Plain) -> Encoded:
        specials = self._template is None
        full = self.tokenizer(*text, add_special_tokens=specials, verbose=False)["input_ids"]
        encoding = self.tokenizer(*text, add_special_tokens=specials, truncation=True, max_length=self.max_tokens)
        type_ids = encoding["token_type_ids"] if self._takes_type_ids else None
        return Encoded(encoding["input_ids"], type_ids, len(full) > self.max_tokens)

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        """Logits for each text, in order: equal to those of the text alone, within rounding (1e-5 in fp32)."""
        rows: dict[int, Logits] = {}
        try:
            for group in self._groups(batch):
                encodings = [batch[index] for index in group]
                logits = self._packed(encodings, replica) if self.packed else self._models[replica](encodings)
                rows |= zip(group, map(tuple, logits.float().tolist()), strict=True)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise TemporaryOutOfMemory(str(error)) from error
        except RuntimeError as error:
            if NO_MEMORY_ON_CPU in str(error):
                raise TemporaryOutOfMemory(one_line(error)) from error
            if not isinstance(error, torch.AcceleratorError):
                raise
            raise ScorerLostError(f"{self._devices[replica]}: {error}") from error
        return [rows[index] for index in range(len(batch))]

    def _groups(self, batch: Sequence[Encoded]) -> list[list[int]]:
        if self._deterministic or self.batching == "alone":
            # Matrix products of different shapes round differently; alone, a text always has the same shape.
            return [[index] for index in range(len(batch))]
        if self.batching == "by length":
            by_length: dict[int, list[int]] = {}
            for index, encoded in enumerate(batch):
                by_length.setdefault(len(encoded.ids), []).append(index)
            return list(by_length.values())
        return [list(range(len(batch)))]

    def _packed(self, batch: Sequence[Encoded], replica: int) -> torch.Tensor:
        type_ids = [_type_ids(encoded) for encoded in batch] if self._takes_type_ids else None
        logits: torch.Tensor = self._models[replica]([encoded.ids for encoded in batch], type_ids)
        return logits

    def _fast_backend(self) -> Any:
        """The tokenizer's fast core, which takes many texts at once; None if its tokens differ from transformers'."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        specials = " ".join(map(str, self.tokenizer.all_special_tokens))
        texts: list[Plain] = [(text, None) for text in ("", f"The film {specials} was good.", " ".join(WORDS) * 2)]
        texts += [(first, "It was  not bad ") for first, _ in texts] if self._settings.join == "pair" else []
        try:
            by_transformers = [self._encode_slowly(text) for text in texts]
        except Exception as error:
            raise ModelError(f"{self.id}: its tokenizer fails on plain words: {one_line(error)}") from error
        backend.no_padding()
        try:
            backend.enable_truncation(self.max_tokens, direction=self.truncation_side)
        except BaseException as error:  # the library panics
            raise ModelError(f"--max-tokens {self.max_tokens} leaves no room for text: {error}") from error
        self._backend = backend
        if by_transformers != self._tokenized(texts):
            return None
        return backend


def _devices(settings: Settings) -> list[torch.device]:
    """The devices to run on. Raises `ModelError` where there is no such device, before any model is loaded."""
    named = ",".join(settings.devices)
    try:
        devices = [torch.device(name) for name in settings.devices]
        for device in devices:
            torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"--devices {named} can't be used: {one_line(error)}; name devices of this machine, or cpu"
        ) from error
    return devices


def _quantised(model: Any) -> Any:
    with warnings.catch_warnings():
        # torch recommends torchao, which needs another package for the same arithmetic.
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig})  # type: ignore[no-untyped-call]


def _replicas(model: Any, devices: list[torch.device]) -> list[Any]:
    """One model for each device. Replicas on the CPU share their weights."""
    try:
        return [(model if device.type == "cpu" else copy.deepcopy(model)).to(device).eval() for device in devices]
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--devices {','.join(map(str, devices))} can't be used: {one_line(error)}") from error


def _type_ids(encoded: Encoded) -> Sequence[int]:
    return encoded.type_ids if encoded.type_ids is not None else [0] * len(encoded.ids)


def _template_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"--chat-template {file} can't be read: {one_line(error)}") from error


def _cut(text: Plain, limit: int, side: str) -> tuple[Plain, bool]:
    first, second = text
    if len(first) <= limit and (second is None or len(second) <= limit):
        return text, False
    piece = slice(limit) if side == "right" else slice(-limit, None)
    return (first[piece], None if second is None else second[piece]), True
