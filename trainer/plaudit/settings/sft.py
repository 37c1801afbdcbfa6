"""Stage 1."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.policy import LoraSettings
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1: supervised fine-tuning of a language model on texts, conversations, or prompts with completions."""

    model: str = "gpt2"
    """Directory or hub id to fine-tune."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a byte-level BPE tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("gpt2"))
    output_dir: Path = Path("runs/sft")
    dataset: Data = field(default_factory=DataSettings)
    data_format: Literal["auto", "text", "messages", "prompt-completion"] = "auto"
    """What the data are. `auto` goes by the columns: messages, else prompt and completion, else text."""
    messages_column: str = "messages"
    """Conversations: lists of {"role", "content"}. The loss is on what the assistant writes, with the token that ends
    each turn."""
    prompt_column: str = "prompt"
    """Prompts, as texts or as conversations. The loss is not on them."""
    completion_column: str = "completion"
    """What follows on each prompt. The loss is on all of it, and on the end-of-text token behind a text."""
    chat_template: str | None = None
    """Jinja file with the chat template, for a tokenizer that has none; saved with it."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enabled=False))
    """Train low-rank adapters in place of all parameters (--lora.enabled)."""
    merge: bool = True
    """With adapters: save the model with them folded in. Off saves the adapters alone, which belong to `model`."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    max_length: int = 128
    """Tokens in one training row. Texts are cut into rows of this length; the first starts where the text does. What is
    longer of a conversation or a completion is left out."""
    eval_texts: int = 1000
    """Held-out texts or conversations that the perplexity is measured on."""
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
        require(
            not (self.from_scratch and self.lora.enabled),
            "from_scratch=True and lora.enabled=True: adapters on a model that was never trained learn nothing; leave "
            "one out",
        )

    @property
    def saves_adapters(self) -> bool:
        """Whether the output directory holds adapters and no whole model."""
        return self.lora.enabled and not self.merge
