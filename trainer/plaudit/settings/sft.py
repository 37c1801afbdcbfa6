"""Settings of stage 1, `plaudit sft`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from plaudit.checks import check_push, positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.policy import LoraSettings, Quantization
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1: supervised fine-tuning of a language model on texts, conversations, or prompts with completions."""

    stage: ClassVar = "sft"
    """The name of its part in a settings file for all stages."""

    model: str = "gpt2"
    """Directory or hub id of the model to fine-tune."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a byte-level BPE tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("gpt2"))
    output_dir: Path = Path("runs/sft")
    """Directory for the model and its figures."""
    dataset: Data = field(default_factory=DataSettings)
    data_format: Literal["auto", "text", "messages", "prompt-completion"] = "auto"
    """Format of the data. `auto` decides by the columns: messages, else prompt and completion, else text."""
    messages_column: str = "messages"
    """Column of conversations, lists of {"role", "content"}. The loss covers the assistant's turns with their end
    tokens."""
    prompt_column: str = "prompt"
    """Column of prompts, texts or conversations. They are masked from the loss."""
    completion_column: str = "completion"
    """Column of completions. The loss covers them, and the end-of-text token after a text."""
    chat_template: str | None = None
    """Jinja file with a chat template, if the tokenizer has none. It is saved with the tokenizer."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enabled=False))
    """Train low-rank adapters instead of all parameters (--lora.enabled)."""
    merge: bool = True
    """With adapters: save the merged model. If off, save only the adapters, which need `model` as their base."""
    quantization: Quantization | None = None
    """With adapters: quantise the base weights to 8 or 4 bits (bitsandbytes) during training. The adapters then go
    on the unquantised weights, and the figures are those of the result."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    max_length: int = 128
    """Tokens in one training row. Texts are split into rows of this length, starting at the text's beginning.
    Conversations and completions are truncated to it."""
    eval_texts: int = 1000
    """Number of held-out texts or conversations for the perplexity."""
    half_precision: bool = False
    """Save the weights in float16."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub to upload the finished result to, such as `me/my-model`. Needs a token
    (HF_TOKEN or `hf auth login`); HF_ENDPOINT names another hub."""
    hub_private: bool = False
    """Create that repository as a private one. One that exists keeps its visibility."""
    resume: str | None = None
    """`auto` continues from the newest checkpoint in output_dir, if there is one. Or the directory of a checkpoint."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints. A checkpoint is also saved when the run is stopped. All are deleted at the
    end."""
    seed: int = 0
    """Of new weights and the order of examples."""

    def __post_init__(self) -> None:
        positive(self, "max_length", "eval_texts", "checkpoint_every")
        check_push(self)
        require(
            self.quantization is None or self.lora.enabled,
            f"quantization={self.quantization} trains adapters only: give --lora.enabled",
        )
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
        """Whether the output directory holds adapters instead of a full model."""
        return self.lora.enabled and not self.merge
