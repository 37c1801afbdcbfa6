"""Where a model's files are, and the name that their content gives them. Quick to import: no torch, no transformers."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from plaudit import demo_models

VOCABULARY_FILES = ("*.model", "*.spm", "*.codes", "*.bpe", "*.tiktoken", "*.vocab", "*.dict")
"""Vocabularies that are neither JSON nor plain text: SentencePiece's and older ones."""
MODEL_FILES = ("*.json", "*.txt", "*.safetensors", "*.jinja", *VOCABULARY_FILES)
LEGACY_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin")
WEIGHTS_LIKE = ("model*.safetensors", LEGACY_WEIGHTS[0])
ADAPTER_WEIGHTS = ("adapter_model*.safetensors", LEGACY_WEIGHTS[1])
ADAPTER_CONFIG = "adapter_config.json"


class ModelError(Exception):
    """The model can't be served. The message is one line and says what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. A directory that holds adapters alone needs that of their base model too."""

    directory: Path
    base: Path | None = None

    @property
    def directories(self) -> tuple[Path, ...]:
        return (self.directory,) if self.base is None else (self.directory, self.base)


def model_source(model: str) -> ModelSource:
    """The files of `model`, and those of its base model if it is a directory of adapters."""
    directory = model_directory(model)
    described = directory / ADAPTER_CONFIG
    if not described.is_file():
        return ModelSource(directory)
    if holds(directory, WEIGHTS_LIKE):
        raise ModelError(
            f"{model} holds a whole model and adapters ({ADAPTER_CONFIG}), and nothing says whether its weights "
            f"include them already: if they do, remove {ADAPTER_CONFIG} and the adapter_model file; if not, remove the "
            "model's weights, so that the adapters are put on the base model that they name"
        )
    if not holds(directory, ADAPTER_WEIGHTS):
        raise ModelError(f"{model} holds {ADAPTER_CONFIG} and no adapter_model.safetensors; give a complete directory")
    base, revision = _named_base(model, described)
    try:
        found = model_directory(base, revision)
    except ModelError as error:
        raise ModelError(f"{model} holds adapters for another model, which {ADAPTER_CONFIG} names: {error}") from error
    if (found / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{model} holds adapters for {base}, which itself holds adapters; {how_to_merge(base)}")
    return ModelSource(directory, found)


def how_to_merge(model: str) -> str:
    """What to do about adapters that can't be put on their base model here."""
    return (
        'merge them first: python -c "from peft import AutoPeftModelForSequenceClassification as Model; '
        f"Model.from_pretrained('{model}').merge_and_unload().save_pretrained('merged')\", and copy the tokenizer's "
        "files to merged/"
    )


def holds(directory: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file of the directory has a name like one of these."""
    return any(path.is_file() for pattern in patterns for path in directory.glob(pattern))


def _named_base(model: str, described: Path) -> tuple[str, str | None]:
    try:
        config = json.loads(described.read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{model}: {ADAPTER_CONFIG} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{model} holds adapters, and {ADAPTER_CONFIG} names no base_model_name_or_path; write it there"
        )
    return base, revision if isinstance(revision, str) else None


def model_directory(model: str, revision: str | None = None) -> Path:
    """The directory `model`, else the embedded model of that name, else the local snapshot of the hub id.

    The only pickles are weights.
    """
    path = Path(demo_models.resolve(model)).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{model} is a file; give the directory that holds the model")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no directory {model}; give a sequence-classification directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
        if not list(snapshot.glob("*.safetensors")):
            patterns = [*MODEL_FILES, *LEGACY_WEIGHTS]
            snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its own, the network's, and what its HTTP library makes of a proxy variable
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(
            f"{model} is neither a directory here nor a model the hub gives ({type(error).__name__}: {reason}); "
            "give a sequence-classification directory or a hub id that can be reached"
        ) from error
    return snapshot


def content_revision(*directories: Path) -> str:
    """`sha256:` and a hash over the names and contents of the model's weights, configuration and tokenizer files.

    Of adapters, over their own directory's and then over their base model's.
    """
    digest = hashlib.sha256()
    for place, directory in enumerate(directories):
        digest.update(b"\0base\n" * place)
        for path in _files(directory):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def file_stamps(*directories: Path) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of each file that makes the revision: equal twice, nothing changed between."""
    stamps = ((path.name, path.stat()) for directory in directories for path in _files(directory))
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]


def _files(directory: Path) -> list[Path]:
    files = {path for pattern in (*MODEL_FILES, *LEGACY_WEIGHTS) for path in directory.glob(pattern) if path.is_file()}
    return sorted(files, key=lambda file: file.name)
