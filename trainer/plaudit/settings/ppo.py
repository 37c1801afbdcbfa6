"""Stage 3."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import fraction, positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings

KLPenalty = Literal["kl", "abs", "mse", "full", "k3"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class PPOHyperparameters:
    """The algorithm's constants, under the names that users of the classic trainer know."""

    learning_rate: float = 1.41e-5
    batch_size: int = 128
    """Samples per step, over all processes."""
    mini_batch_size: int = 128
    """Samples per optimizer step and gradient accumulation step."""
    gradient_accumulation_steps: int = 1
    micro_batch_size: int | None = None
    """Samples that go through the model at once; not given means as many of a mini-batch as memory takes. Changes no
    number."""
    ppo_epochs: int = 4
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    target: float = 6.0
    """Summed KL per sample that the adaptive controller steers towards."""
    horizon: float = 10_000.0
    """Samples over which the controller may change the coefficient by about a fifth."""
    kl_penalty: KLPenalty = "kl"
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    ratio_threshold: float = 10.0
    """A mini-batch whose mean ratio exceeds this is skipped and no weight moves."""
    max_grad_norm: float | None = None
    early_stopping: bool = False
    target_kl: float = 1.0
    """With early stopping: no further epoch after one that ends above 1.5 times this."""
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    value_head_learning_rate: float | None = None
    """Learning rate of the value head where it differs from the policy's."""
    lr_schedule: LearningRateSchedule = "constant"
    """How the learning rate falls to 0 over the run's steps, once warmed up."""
    lr_warmup_steps: int = 0
    """PPO steps over which the learning rate rises from 0."""

    def __post_init__(self) -> None:
        positive(
            self,
            "learning_rate",
            "batch_size",
            "mini_batch_size",
            "gradient_accumulation_steps",
            "micro_batch_size",
            "ppo_epochs",
            "target",
            "horizon",
            "cliprange",
            "cliprange_value",
            "ratio_threshold",
            "max_grad_norm",
            "target_kl",
            "score_clip",
            "adam_eps",
            "value_head_learning_rate",
        )
        fraction(self, "gamma", "lam", "adam_beta1", "adam_beta2")
        require(self.lr_warmup_steps >= 0, f"lr_warmup_steps={self.lr_warmup_steps} must be 0 or more")
        require(self.init_kl_coef >= 0, f"init_kl_coef={self.init_kl_coef} must be 0 or more")
        per_optimizer_step = self.mini_batch_size * self.gradient_accumulation_steps
        require(
            self.batch_size % per_optimizer_step == 0,
            f"mini_batch_size={self.mini_batch_size} x gradient_accumulation_steps={self.gradient_accumulation_steps} "
            f"= {per_optimizer_step} does not divide batch_size={self.batch_size}",
        )
        require(
            self.use_score_scaling or not self.use_score_norm,
            "use_score_norm=True needs use_score_scaling=True",
        )


@dataclass(frozen=True)
class PenaltySettings:
    """What is taken off a response's reward before the update. All are off by default."""

    missing_eos: float = 0.0
    """Off a response that ran out of tokens before the end of text. Drawn lengths make that common."""
    per_token: float = 0.0
    """Off for each response token beyond the free ones."""
    free_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("missing_eos", "per_token", "free_tokens"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), f"{name}={value} must be 0 (off) or more")


@dataclass(frozen=True)
class PPOConfig:
    """Stage 3: PPO against a reward service."""

    policy: str = "lvwerra/gpt2-imdb"
    """Directory or hub id of the causal language model to train."""
    output_dir: Path = Path("runs/ppo")
    """Where checkpoints, metrics and the trained policy go; one run's, and nobody else's while it lasts."""
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    penalties: PenaltySettings = field(default_factory=PenaltySettings)
    ppo: PPOHyperparameters = field(default_factory=PPOHyperparameters)
    check: bool = False
    """Train nothing: load everything, take one step in memory, and say what a run would do and take."""
    steps: int | None = None
    """PPO steps; not given means one pass over the prompts."""
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in output_dir, if there is one; or a checkpoint's directory."""
    checkpoint_every: int = 50
    """Steps between checkpoints. One is also written when the run is stopped or runs out of patience."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_samples_every: int = 10
    """Steps between tables of sampled responses in TensorBoard; 0 turns them off."""
    merge: bool = False
    """Also write OUTPUT_DIR/merged: the adapters folded into the model, for plain transformers."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, ... as accelerate names them."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    collective_timeout_s: float = 600.0
    """With several processes: how long one waits for another, beyond what waiting for rewards may take."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "steps", "checkpoint_every", "keep_checkpoints", "collective_timeout_s")
        require(self.log_samples_every >= 0, f"log_samples_every={self.log_samples_every} must be 0 (off) or more")
