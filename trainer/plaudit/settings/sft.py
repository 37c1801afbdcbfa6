"""Stage 1."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.settings.checks import positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1: supervised fine-tuning of a causal language model on texts."""

    model: str = "gpt2"
    """Directory or hub id to fine-tune."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a byte-level BPE tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("gpt2"))
    output_dir: Path = Path("runs/sft")
    dataset: Data = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    max_length: int = 128
    """Tokens in one training row. Texts are cut into rows of this length; the first starts where the text does."""
    eval_texts: int = 1000
    """Held-out texts that the perplexity is measured on."""
    half_precision: bool = False
    """Save the weights in float16."""
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in output_dir, if there is one; or a checkpoint's directory."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints. One is also written when the run is stopped, and they go when it is done."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "max_length", "eval_texts", "checkpoint_every")
        require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )
