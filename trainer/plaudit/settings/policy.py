"""The policy: its adapters, how it is held and computed, how it samples."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from plaudit.checks import positive, require
from plaudit.settings.data import PromptKind

Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the model (peft.LoraConfig)."""

    enabled: bool = True
    """Off trains every parameter; the reference of PPO is then a frozen second copy."""
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    """Of stages 1 and 2. PPO runs without dropout and records it alone: a ratio compares two scores of one network."""
    target_modules: tuple[str, ...] | None = None
    """Module names to adapt; found by architecture when not given."""

    def __post_init__(self) -> None:
        positive(self, "r", "alpha")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True)
class ModelSettings:
    """How the policy is held in memory and computed."""

    quantization: Quantization | None = None
    """Base weights in 8 or 4 bits (bitsandbytes); adapters and value head stay in full precision."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass of updates: less memory, about a third more time."""
    bf16: bool = False
    """Autocast to bfloat16; weights, log-probabilities and losses stay in fp32."""
    tf32: bool = False
    """Multiply fp32 matrices with 10 bits of mantissa on GPUs that can: several times as fast, no longer exact fp32."""
    compile: bool = False
    """Compile the transformer for evaluation and updates (torch.compile): a minute at the start, faster steps after."""
    cuda_graphs: bool = True
    """On a GPU, record the update of a whole mini-batch as one CUDA graph, where model and settings allow it."""
    separate_value_model: bool = False
    """Values from a transformer of their own, which starts as a copy of the policy and learns whole."""


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled, and where they end: an end token, a stop string, or the longest that they may get."""

    min_new_tokens: int = 4
    """Where lengths are drawn: the least that a response may be allowed."""
    max_new_tokens: int = 16
    draw_lengths: bool | None = None
    """Each response draws how long it may get, between the two bounds. Not given: for openings of texts, as the
    published recipe has it; answers to prompts of a column may have `max_new_tokens`."""
    stop: tuple[str, ...] = ()
    """Texts that end a response where they appear. PPO scores their tokens; the reward sees what stands before them."""
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary. Log-probabilities are those of the distribution sampled from."""
    top_p: float = 1.0
    batch_size: int = 128
    """Prompts generated at once; also the size of the chunks sent to the reward service."""
    static_cache: bool | None = None
    """Sample with CUDA graphs and a key-value cache of fixed size. By default on GPUs, where the model can; slower on
    CPUs. `plaudit evaluate` does without."""

    def answering(self, kind: PromptKind) -> "GenerationSettings":
        """The same, with `draw_lengths` decided for prompts of this kind."""
        return self if self.draw_lengths is not None else dataclasses.replace(self, draw_lengths=kind == "openings")

    def __post_init__(self) -> None:
        require(
            1 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens={self.min_new_tokens} and max_new_tokens={self.max_new_tokens}: "
            "need 1 <= min_new_tokens <= max_new_tokens",
        )
        positive(self, "temperature", "batch_size")
        require(all(self.stop), "generation.stop has an empty text, which would end every response at once")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (off) or more")
