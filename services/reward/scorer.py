"""Load a sequence classifier and run it. The only module of the service that knows torch and transformers.

A model that can't give an honest reward never starts: a head without trained weights, a label that isn't there, a
tokenizer that is missing each end in a `ModelError` that says what to do.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from services.reward.batching import Encoded, Logits, ScorerLostError, Text
from services.reward.settings import Settings

CHARS_PER_TOKEN_LIMIT = 64
"""A text is cut to this many characters for each token the model can see, before it is tokenised: a megabyte would
otherwise hold the tokenizer for a second. English has about 4 characters a token."""
FALLBACK_MAX_TOKENS = 512
"""For a model that names no limit of its own."""
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
LEGACY_WEIGHTS = "pytorch_model*.bin"
WEIGHTS_LIKE = ("model*.safetensors", LEGACY_WEIGHTS)


class ModelError(Exception):
    """The model can't be served. The message is one line and says what to do."""


def load_scorer(settings: Settings) -> "TransformersScorer":
    """The scorer that `settings` ask for, warmed up. Raises `ModelError`."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    directory = model_directory(settings.model)
    scorer = TransformersScorer(directory, settings)
    if settings.label is not None and settings.label not in scorer.labels:
        raise ModelError(f"{settings.model} has no label {settings.label!r}; its labels are {', '.join(scorer.labels)}")
    scorer.warm_up()
    return scorer


def model_directory(model: str) -> Path:
    """`model` itself where it is a directory, else the local snapshot of the hub id. The only pickles are weights."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{model} is a file; give the directory that holds the model")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no directory {model}; give a sequence-classification directory or a hub id")
    try:
        snapshot = Path(snapshot_download(model, allow_patterns=list(MODEL_FILES)))
        if not list(snapshot.glob("*.safetensors")):
            snapshot = Path(snapshot_download(model, allow_patterns=[*MODEL_FILES, LEGACY_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{model} is neither a directory here nor a model the hub gives ({type(error).__name__}: {reason}); "
            "give a sequence-classification directory or a hub id that can be reached"
        ) from error
    return snapshot


def content_revision(directory: Path) -> str:
    """`sha256:` and a hash over the names and contents of the model's weights, configuration and tokenizer files."""
    files = {path for pattern in (*MODEL_FILES, LEGACY_WEIGHTS) for path in directory.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda file: file.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


class TransformersScorer:
    """Any Hugging Face sequence classifier, in padded batches."""

    packed = False
    replicas = 1

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.id = settings.model
        self.revision = content_revision(directory)
        self.dtype = settings.dtype
        config, tokenizer, model = _load(directory, settings)
        self.labels: tuple[str, ...] = tuple(config.id2label[index] for index in range(config.num_labels))
        if len(set(self.labels)) != len(self.labels):
            raise ModelError(f"{settings.model} gives the same name to several labels: {', '.join(self.labels)}")
        self.device = torch.device(settings.device)
        self.max_tokens = _max_tokens(config, tokenizer, settings.max_tokens)
        self.truncation_side = settings.truncation_side
        self._model = model.to(self.device).eval()
        self._takes_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._pad_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        # A decoder pools at the last token that isn't padding. Without a padding token it can't tell, so texts of one
        # length share a forward pass and no id counts as padding.
        self._same_length_only = config.pad_token_id is None and tokenizer.pad_token_id is None
        if self._same_length_only:
            self._pad_id = -1
        if config.pad_token_id is None:
            config.pad_token_id = self._pad_id
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
        if not self._same_length_only:
            return self._forward(batch)
        rows: dict[int, Logits] = {}
        for length in {len(encoded.ids) for encoded in batch}:
            members = [index for index, encoded in enumerate(batch) if len(encoded.ids) == length]
            rows |= zip(members, self._forward([batch[index] for index in members]), strict=True)
        return [rows[index] for index in range(len(batch))]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Encoded]) -> list[Logits]:
        width = max(len(encoded.ids) for encoded in batch)

        def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows]).to(
                self.device, non_blocking=True
            )

        ids = [encoded.ids for encoded in batch]
        inputs = {
            "input_ids": padded(ids, self._pad_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        if self._takes_type_ids:
            inputs["token_type_ids"] = padded([encoded.type_ids or [0] * len(encoded.ids) for encoded in batch], 0)
        return self._run(lambda: self._model(**inputs).logits)

    def _run(self, forward: Any) -> list[Logits]:
        try:
            return [tuple(row) for row in forward().float().tolist()]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        except torch.AcceleratorError as error:
            raise ScorerLostError(f"{self.device}: {error}") from error

    def warm_up(self) -> None:
        """One forward pass, so that the first caller doesn't pay for lazy initialisation, and a broken model shows."""
        try:
            rows = self.score(self.encode([("warm up", None), ("warm up the model", None)]), 0)
        except Exception as error:
            raise ModelError(f"{self.id} loads but does not run: {type(error).__name__}: {error}") from error
        if len(rows[0]) != len(self.labels):
            raise ModelError(f"{self.id} gives {len(rows[0])} logits for {len(self.labels)} labels")


def _load(directory: Path, settings: Settings) -> tuple[Any, Any, Any]:
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, truncation_side=settings.truncation_side)
    except Exception as error:
        raise ModelError(f"{name} holds no tokenizer that can be loaded: {_one_line(error)}") from error
    return config, tokenizer, model


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
    if positions is not None and config.model_type in {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"}:
        positions -= config.pad_token_id + 1  # these families number their positions from there
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
