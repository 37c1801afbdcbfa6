"""Stage 2."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import fraction, positive, require
from plaudit.settings.data import Data, DataSettings
from plaudit.settings.people import check_batch
from plaudit.settings.policy import LoraSettings
from plaudit.settings.supervised import ModelSizes, OptimizerSettings


@dataclass(frozen=True)
class RewardModelConfig:
    """Stage 2: a reward model, from labelled texts (classifier) or ranked answers (pairwise)."""

    kind: Literal["classifier", "pairwise"] = "classifier"
    """`classifier` learns labels with cross-entropy; `pairwise` learns one score with the Bradley-Terry loss."""
    model: str = "distilbert-base-uncased"
    """Directory or hub id to start from: a classifier, or any encoder or language model, which gets a new head."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("distilbert", 8192, 128, 2, 2, 256))
    output_dir: Path = Path("runs/reward-model")
    dataset: Data = field(default_factory=DataSettings)
    label_names: tuple[str, ...] = ("NEGATIVE", "POSITIVE")
    """The labels' names, in the order of the head, as the reward service offers them. The data's labels may be these
    names, or numbers that count them from 0."""
    ranked: str | None = None
    """Pairwise: a file or hub id of rankings, or the address of a ranking service (http://…). Rows are {"prompt",
    "answers"} (best first, or with "ranks"), chosen and rejected with or without a prompt and a margin, or what the
    ranking service exports. Prompts may be texts or conversations."""
    batches: tuple[str, ...] = ()
    """Of a ranking service: which batches to learn from; all that are made for training unless given."""
    api_key_file: Path | None = None
    """File with the ranking service's key; the environment variable RANK_API_KEY is the other way."""
    patience_s: float = 600.0
    """How long the ranking service may stay unavailable."""
    weights: Literal["equal", "reliability"] = "equal"
    """Pairwise: what a person's word is worth. `reliability` takes the ranking service's estimates, for people who
    share 30 tasks or more with others."""
    center_rewards_coefficient: float = 0.0
    """Pairwise: pull scores towards 0 on average with this coefficient on (r_i + r_j)^2; 0.01 is usual."""
    scale_on: str = "training"
    """Pairwise: scale the scores to standard deviation 1 on these answers: `training` for those trained on, `none`, or
    a file of answers (as `plaudit sample` writes it, or prompt and completion). The factor goes into the head."""
    scale_policy: str | None = None
    """Of these answers, only those of this policy, as `plaudit sample` names it: PPO's reference."""
    allow_chance: bool = False
    """Pairwise: save the model even if its accuracy on held-out pairs can't be told from guessing."""
    chat_template: str | None = None
    """Jinja file with the chat template for prompts that are conversations, where the tokenizer has none; saved with
    it."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enabled=False))
    """Train low-rank adapters in place of all parameters (--lora.enabled); they are folded into the model that is
    saved."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=2e-5, epochs=2))
    max_length: int = 256
    crop_fraction: float = 0.5
    """Classifier: share of training batches that are cut to random short passages, since short texts are what the
    reward model will judge. 0 turns it off."""
    crop_min_tokens: int = 8
    crop_max_tokens: int = 64
    short_words: int = 20
    """Held-out accuracy is also told on the first so many words of each text."""
    eval_examples: int | None = None
    """Measure on the first so many held-out texts or prompts; on all unless given."""
    half_precision: bool = False
    """Save the weights in float16."""
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in output_dir, if there is one; or a checkpoint's directory."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints. One is also written when the run is stopped, and they go when it is done."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "max_length", "crop_min_tokens", "crop_max_tokens", "short_words", "checkpoint_every")
        positive(self, "patience_s", "eval_examples")
        fraction(self, "crop_fraction")
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
        require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )

    @property
    def ranked_is_service(self) -> bool:
        """Whether the rankings are asked for over HTTP."""
        return self.ranked is not None and self.ranked.startswith(("http://", "https://"))
