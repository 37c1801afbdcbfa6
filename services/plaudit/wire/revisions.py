"""The revision of a reward model: a hash of what its files hold, as every message of the reward service names it.

Whoever has the directory can compute it, and so knows whether a service serves the same bytes.

Failure modes: two models have the same revision, or a copy has another one.
"""

import hashlib
from pathlib import Path

from plaudit import atomic

VOCABULARY_FILES = ("*.model", "*.spm", "*.codes", "*.bpe", "*.tiktoken", "*.vocab", "*.dict")
"""Vocabulary files that are neither JSON nor plain text: SentencePiece's and older formats."""
MODEL_FILES = ("*.json", "*.txt", "*.safetensors", "*.jinja", *VOCABULARY_FILES)
LEGACY_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin")


def content_revision(*directories: Path) -> str:
    """`sha256:` and a hash over the names and contents of the model's weights, configuration and tokenizer files.

    For adapters, it covers the files of their directory, then those of their base model. Raises `OSError`.
    """
    digest = hashlib.sha256()
    for place, directory in enumerate(directories):
        digest.update(b"\0base\n" * place)
        for path in model_files(directory):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_files(directory: Path) -> list[Path]:
    """The files that the revision covers, by name, each at its current path (`plaudit.atomic`). Raises `OSError`."""
    found = {path for pattern in (*MODEL_FILES, *LEGACY_WEIGHTS) for path in atomic.current_files(directory, pattern)}
    return sorted(found, key=lambda file: file.name)
