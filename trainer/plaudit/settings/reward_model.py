"""Settings of stage 2, `plaudit reward-model`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from plaudit.checks import check_push, fraction, positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.people import check_batch
from plaudit.settings.policy import LoraSettings, Quantization
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class RewardModelConfig:
    """Stage 2: train a reward model from labelled texts (classifier) or ranked answers (pairwise)."""

    stage: ClassVar = "reward-model"
    """The name of its part in a settings file for all stages."""

    kind: Literal["classifier", "pairwise"] = "classifier"
    """`classifier` trains on labels with cross-entropy; `pairwise` trains one score with the Bradley-Terry loss."""
    model: str = "distilbert-base-uncased"
    """Directory or hub id of the initial model: a classifier, or any encoder or language model, which gets a new
    head."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("distilbert", 8192, 128, 2, 2, 256))
    output_dir: Path = Path("runs/reward-model")
    """Directory for the reward model and its figures."""
    dataset: Data = field(default_factory=DataSettings)
    label_names: tuple[str, ...] = ("NEGATIVE", "POSITIVE")
    """Names of the labels in the head's order, as the reward service lists them. The data may contain these names, or
    their indices from 0. With these two names, stars and words such as good and bad are understood as well."""
    label_map: tuple[str, ...] = ()
    """What the values in the label column mean, as in `1=NEGATIVE 2=NEGATIVE 4=POSITIVE 5=POSITIVE`. Texts with other
    values are left out. Default: by the names."""
    ranked: str | None = None
    """Pairwise: file or hub id of rankings, or the address of a ranking service (http://…). Rows are {"prompt",
    "answers"} (best first, or with "ranks"), chosen and rejected (optionally with a prompt and a margin), or exports of
    the ranking service. Prompts may be texts or conversations."""
    batches: tuple[str, ...] = ()
    """Batches of the ranking service to train on. Default: all training batches."""
    api_key_file: Path | None = None
    """File with the ranking service's key. Alternative: RANK_API_KEY in the environment."""
    patience_s: float = 600.0
    """How long to retry while the ranking service is unavailable."""
    weights: Literal["equal", "reliability"] = "equal"
    """Pairwise: weights of the annotators. `reliability` uses the ranking service's estimates, for people with 30 tasks
    or more in common with others."""
    center_rewards_coefficient: float = 0.0
    """Pairwise: coefficient of (r_i + r_j)^2 in the loss, which pulls scores towards a mean of 0. A usual value is
    0.01."""
    scale_on: str = "training"
    """Pairwise: scale scores to standard deviation 1 on these answers: `training` (the training answers), `none`, or a
    file of answers (from `plaudit sample`, or prompt and completion). The head's weights absorb the factor."""
    scale_policy: str | None = None
    """Scale only on answers of this policy, as `plaudit sample` names it. Use PPO's reference."""
    allow_chance: bool = False
    """Pairwise: save the model even if its accuracy on held-out pairs can't be distinguished from guessing."""
    chat_template: str | None = None
    """Jinja file with a chat template for prompts that are conversations, if the tokenizer has none. It is saved with
    the tokenizer."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enabled=False))
    """Train low-rank adapters instead of all parameters (--lora.enabled). They are merged into the saved model."""
    quantization: Quantization | None = None
    """With adapters: quantise the base weights to 8 or 4 bits (bitsandbytes) during training. The adapters then go
    on the unquantised weights, and the figures are those of the result."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    max_length: int = 256
    """Longest input, in tokens."""
    crop_fraction: float = 0.5
    """Classifier: share of training batches cropped to short random passages, because the reward model will judge short
    texts. 0 turns it off."""
    crop_min_tokens: int = 8
    crop_max_tokens: int = 64
    short_words: int = 20
    """The held-out accuracy is also measured on this many leading words of each text."""
    eval_examples: int | None = None
    """Maximum number of held-out texts or prompts in the evaluation. Default: all."""
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
        positive(self, "max_length", "crop_min_tokens", "crop_max_tokens", "short_words", "checkpoint_every")
        positive(self, "patience_s", "eval_examples")
        fraction(self, "crop_fraction")
        check_push(self)
        require(
            self.quantization is None or self.lora.enabled,
            f"quantization={self.quantization} trains adapters only: give --lora.enabled",
        )
        require(
            self.center_rewards_coefficient >= 0,
            f"center_rewards_coefficient={self.center_rewards_coefficient} must be 0 (off) or more",
        )
        for batch in self.batches:
            check_batch(batch)
        require(
            self.weights == "equal" or self.ranked_is_service,
            f"weights=reliability needs the ranking service's own estimates, and ranked={self.ranked!r} is no service: "
            "give its address as --ranked, or weights=equal",
        )
        require(
            not self.batches or self.ranked_is_service,
            f"batches={', '.join(self.batches)} are those of a ranking service, and ranked={self.ranked!r} is none",
        )
        require(
            not (self.from_scratch and self.lora.enabled),
            "from_scratch=True and lora.enabled=True: adapters on a model that was never trained learn nothing; leave "
            "one out",
        )
        require(
            self.crop_min_tokens <= self.crop_max_tokens,
            f"crop_min_tokens={self.crop_min_tokens} is more than crop_max_tokens={self.crop_max_tokens}",
        )
        require(
            self.kind != "pairwise" or self.ranked is not None,
            "kind=pairwise needs ranked=FILE or the address of a ranking service: rankings, or chosen and rejected "
            "answers",
        )
        require(
            len(set(self.label_names)) == len(self.label_names) >= 2,
            f"label_names={self.label_names} must be at least two different names",
        )
        for entry in self.label_map:
            value, _, name = entry.rpartition("=")
            require(bool(value and name), f"label_map={entry!r} must be VALUE=NAME, as in 5=POSITIVE")
        require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )

    @property
    def ranked_is_service(self) -> bool:
        """Whether the rankings come from a ranking service."""
        return self.ranked is not None and self.ranked.startswith(("http://", "https://"))
