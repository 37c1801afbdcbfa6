"""Settings of the policy: adapters, precision and compilation, sampling."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from plaudit.checks import positive, require
from plaudit.settings.data import PromptKind

Quantization = Literal["8bit", "4bit"]
LOGITS_MIB = 512.0
Dtype = Literal["fp32", "bf16", "fp16", "auto"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the model (peft.LoraConfig)."""

    enabled: bool = True
    """If off, all parameters are trained. PPO's reference is then a frozen second copy."""
    r: int = 16
    """Rank of the adapters."""
    alpha: int = 32
    """The adapters' output is multiplied by alpha / r."""
    dropout: float = 0.05
    """Used in stages 1 and 2. PPO only records it and runs without dropout, because its ratio needs a deterministic
    network."""
    target_modules: tuple[str, ...] | None = None
    """Names of the modules to adapt. Default: chosen by architecture."""

    def __post_init__(self) -> None:
        positive(self, "r", "alpha")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True)
class ModelSettings:
    """Precision, memory and compilation of the policy."""

    dtype: Dtype = "fp32"
    """Format of the weights that don't learn: the base below adapters, and the reference. `auto` is the checkpoint's
    own. Adapters, value head, log-probabilities, losses and the optimizer's state are fp32 in any case."""
    quantization: Quantization | None = None
    """Quantise the base weights to 8 or 4 bits (bitsandbytes). Adapters and value head stay in full precision."""
    logits_mib: float = LOGITS_MIB
    """Largest size of the fp32 logits of a pass's response tokens. Above it, tokens go through the output head in
    pieces of an eighth of it, forward and backward, which takes one more product with the head."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass of updates. Saves memory and takes about a third more time."""
    bf16: bool = False
    """Autocast to bfloat16; weights stay as `dtype` says, log-probabilities and losses in fp32."""
    tf32: bool = False
    """Use TF32 (10 bits of mantissa) for fp32 matrix products on GPUs that support it: several times as fast, less
    exact."""
    compile: bool = False
    """Compile the transformer for evaluation and updates (torch.compile): a minute at the start, then faster steps."""
    cuda_graphs: bool = True
    """On a GPU, capture the update of a whole mini-batch as one CUDA graph, if model and settings allow it."""
    value_model: str = "shared"
    """Transformer of the value head. `shared`: the policy's own. `copy`: a copy of the policy's start. Otherwise the
    directory or hub id of a causal model with the policy's vocabulary, such as a reward model made from one, whose
    score head the value head starts from. If a run has saved a value model beside the policy, that one is used."""
    value_model_lora: bool = False
    """Train adapters on the value model, with the settings of `lora`, instead of all its parameters."""
    separate_value_model: bool = False
    """Earlier name of value_model=copy."""

    @property
    def value_source(self) -> str:
        """`value_model`, under whichever name it was given."""
        return "copy" if self.separate_value_model else self.value_model

    def __post_init__(self) -> None:
        positive(self, "logits_mib")
        require(
            not self.separate_value_model or self.value_model in ("shared", "copy"),
            f"separate_value_model=True means value_model=copy, and cannot go with value_model={self.value_model}",
        )
        require(
            not (self.value_model_lora and self.value_source == "shared"),
            "value_model_lora=True needs a value model of its own: give value_model=copy or a directory",
        )
        require(not (self.bf16 and self.dtype == "fp16"), "bf16=True computes in bf16: it cannot go with dtype=fp16")


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling of responses, which end with an end token, a stop string, or at the length limit."""

    min_new_tokens: int = 4
    """With drawn lengths: the lower bound of a response's length limit."""
    max_new_tokens: int = 16
    """Length limit of a response, in tokens."""
    draw_lengths: bool | None = None
    """Draw each response's length limit between min_new_tokens and max_new_tokens. Default: on for openings of texts,
    as in the published recipe; off for prompts from a column, where the limit is max_new_tokens."""
    stop: tuple[str, ...] = ()
    """Stop strings. PPO trains on their tokens; the reward sees only the text before them."""
    temperature: float = 1.0
    """Divisor of the logits before sampling. Log-probabilities are those of the divided logits."""
    top_k: int = 0
    """0 keeps the whole vocabulary. Log-probabilities are those of the truncated sampling distribution."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 keeps the whole vocabulary."""
    batch_size: int = 128
    """Prompts generated at once. Also the size of the chunks passed to the reward client."""
    static_cache: bool | None = None
    """Sample with CUDA graphs and a static key-value cache. Default: on for GPUs if the model supports it; slower on
    CPUs. `plaudit evaluate` doesn't use it."""

    def answering(self, kind: PromptKind) -> "GenerationSettings":
        """These settings with `draw_lengths` resolved for prompts of this kind."""
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
