"""Settings shared by stages 1 and 2: the sizes of a model trained from scratch, and the optimizer."""

from dataclasses import dataclass
from typing import Literal

from plaudit.checks import fraction, positive, require


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model trained from scratch. The head size is `hidden_size / heads`."""

    model_type: str
    """A `model_type` that transformers knows: gpt2, llama, distilbert, ..."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""
    hidden_size: int = 192
    """Width of the model."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 3
    """Attention heads."""
    max_positions: int = 128
    """Longest input, in tokens."""

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "layers", "heads", "max_positions")
        require(
            self.hidden_size % self.heads == 0, f"heads={self.heads} does not divide hidden_size={self.hidden_size}"
        )
        # Every byte-level BPE vocabulary contains 256 bytes and the special tokens.
        require(self.vocab_size >= 264, f"vocab_size={self.vocab_size} must be at least 264")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and schedule of stages 1 and 2."""

    learning_rate: float | None = None
    """AdamW's learning rate. Default: chosen for the model's size, and for adapters or all parameters. The log says
    which."""
    muon_learning_rate: float | None = None
    """If given, torch.optim.Muon with this rate trains the weight matrices, and AdamW the rest. Helps from scratch."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    batch_size: int = 32
    """Examples per optimizer step."""
    epochs: float | None = None
    """Passes over the examples. Default: 1 in stage 1 and 2 for a reward model; 3 and 5 if there are so few texts that
    these would be under 100 optimizer steps."""
    max_steps: int | None = None
    """Maximum number of optimizer steps; overrides `epochs`."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "muon_learning_rate", "batch_size", "epochs", "max_steps", "max_grad_norm")
        fraction(self, "warmup_fraction")
