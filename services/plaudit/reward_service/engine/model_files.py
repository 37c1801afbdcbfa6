"""Where a model's files are, and which of them its revision covers. Quick to import: no torch, no transformers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plaudit.wire import revisions
from plaudit.wire.revisions import LEGACY_WEIGHTS, MODEL_FILES

WEIGHTS_LIKE = ("model*.safetensors", LEGACY_WEIGHTS[0])
ADAPTER_WEIGHTS = ("adapter_model*.safetensors", LEGACY_WEIGHTS[1])
ADAPTER_CONFIG = "adapter_config.json"


class ModelError(Exception):
    """The model can't be served. The message is one line and says what to do."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. A directory of adapters also needs the directory of their base model."""

    directory: Path
    base: Path | None = None

    @property
    def directories(self) -> tuple[Path, ...]:
        """The model's directory, then its base model's."""
        return (self.directory,) if self.base is None else (self.directory, self.base)


def model_source(model: str, directory_of: Callable[[str, str | None], Path]) -> ModelSource:
    """The files of `model`, and of its base model if it is a directory of adapters. Raises `ModelError`.

    `directory_of` gives the directory of a model at a revision, which adapters may name.
    """
    directory = directory_of(model, None)
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
        found = directory_of(base, revision)
    except ModelError as error:
        raise ModelError(f"{model} holds adapters for another model, which {ADAPTER_CONFIG} names: {error}") from error
    if (found / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{model} holds adapters for {base}, which itself holds adapters; {how_to_merge(base)}")
    return ModelSource(directory, found)


def how_to_merge(model: str) -> str:
    """Advice for adapters that this service can't merge into their base model."""
    return (
        'merge them first: python -c "from peft import AutoPeftModelForSequenceClassification as Model; '
        f"Model.from_pretrained('{model}').merge_and_unload().save_pretrained('merged')\", and copy the tokenizer's "
        "files to merged/"
    )


def holds(directory: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file of the directory matches one of these patterns."""
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


def looks_like_a_path(model: str) -> bool:
    """Whether `model` can't be a hub id: those are `name` or `owner/name`."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def snapshot(model: str, revision: str | None = None) -> Path:
    """The local copy of a hub model, at `revision` if it is pinned. Pickles are downloaded only as weights."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=list(MODEL_FILES)))
        if not list(found.glob("*.safetensors")):
            patterns = [*MODEL_FILES, *LEGACY_WEIGHTS]
            found = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its own errors, the network's, and its HTTP library's about proxy variables
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        at = f" at revision {revision}" if revision is not None else ""
        raise ModelError(
            f"{model}{at} is neither a local directory nor a model on the hub ({type(error).__name__}: {reason}); "
            "give a sequence-classification directory or a hub id that can be reached"
        ) from error
    return found


def with_template(revision: str, template: str) -> str:
    """The revision of a model that is given this chat template in place of its own."""
    digest = hashlib.sha256(f"{revision}\0chat template\0{template}".encode())
    return f"sha256:{digest.hexdigest()}"


def file_stamps(*directories: Path) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of each file of the revision. If two calls agree, no file changed in between."""
    stamps = ((path.name, path.stat()) for directory in directories for path in model_files(directory))
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]


def model_files(directory: Path) -> list[Path]:
    """The files that the revision covers, by name, each at its current path (`plaudit.atomic`). Raises `ModelError`."""
    try:
        return revisions.model_files(directory)
    except OSError as error:
        raise ModelError(f"{directory} can't be read: {error.strerror}: {error.filename}") from error
