"""Where a model's files are, and the name that their content gives them. Quick to import: no torch, no transformers."""

import hashlib
from pathlib import Path

from plaudit import demo_models

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja")
LEGACY_WEIGHTS = "pytorch_model*.bin"
WEIGHTS_LIKE = ("model*.safetensors", LEGACY_WEIGHTS)


class ModelError(Exception):
    """The model can't be served. The message is one line and says what to do."""


def model_directory(model: str) -> Path:
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

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
    digest = hashlib.sha256()
    for path in _files(directory):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def file_stamps(directory: Path) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of each file that makes the revision: equal twice, nothing changed between."""
    stamps = ((path.name, path.stat()) for path in _files(directory))
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]


def _files(directory: Path) -> list[Path]:
    files = {path for pattern in (*MODEL_FILES, LEGACY_WEIGHTS) for path in directory.glob(pattern) if path.is_file()}
    return sorted(files, key=lambda file: file.name)
