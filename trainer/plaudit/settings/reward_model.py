"""Stage 2."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.settings.checks import fraction, positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class RewardModelConfig:
    """Stage 2: a reward model, from labelled texts (classifier) or ranked answers (pairwise)."""

    kind: Literal["classifier", "pairwise"] = "classifier"
    """`classifier` learns labels with cross-entropy; `pairwise` learns one score with the Bradley-Terry loss."""
    model: str = "distilbert-base-uncased"
    """Directory or hub id to start from."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("distilbert", 8192, 128, 2, 2, 256))
    output_dir: Path = Path("runs/reward-model")
    dataset: Data = field(default_factory=DataSettings)
    label_names: tuple[str, ...] = ("NEGATIVE", "POSITIVE")
    """The labels' names, in the order of the head, as the reward service offers them. The data's labels may be these
    names, or numbers that count them from 0."""
    ranked: Path | None = None
    """Pairwise: JSON lines of {"prompt": ..., "answers": [best, ..., worst]}."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=2e-5, epochs=2))
    max_length: int = 256
    crop_fraction: float = 0.5
    """Classifier: share of training batches that are cut to random short passages, since short texts are what the
    reward model will judge. 0 turns it off."""
    crop_min_tokens: int = 8
    crop_max_tokens: int = 64
    short_words: int = 20
    """Held-out accuracy is also told on the first so many words of each text."""
    half_precision: bool = False
    """Save the weights in float16."""
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in output_dir, if there is one; or a checkpoint's directory."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints. One is also written when the run is stopped, and they go when it is done."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "max_length", "crop_min_tokens", "crop_max_tokens", "short_words", "checkpoint_every")
        fraction(self, "crop_fraction")
        require(
            self.crop_min_tokens <= self.crop_max_tokens,
            f"crop_min_tokens={self.crop_min_tokens} is more than crop_max_tokens={self.crop_max_tokens}",
        )
        require(
            self.kind != "pairwise" or self.ranked is not None,
            'kind=pairwise needs ranked=FILE with lines of {"prompt": ..., "answers": [best, ..., worst]}',
        )
        require(
            len(set(self.label_names)) == len(self.label_names) >= 2,
            f"label_names={self.label_names} must be at least two different names",
        )
        require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )
