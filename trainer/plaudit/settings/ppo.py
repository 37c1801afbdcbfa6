"""Settings of stage 3, `plaudit ppo`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from plaudit.checks import check_push, fraction, positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.watch import WatchSettings

KLPenalty = Literal["kl", "abs", "mse", "full", "k3"]
AdvantageEstimator = Literal["gae", "rloo", "grpo", "dr_grpo"]
KLLoss = Literal["k1", "k2", "k3"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True)
class PPOSettings:
    """Hyperparameters of PPO, under the names of TRL's classic trainer. Four of them may be left open (None): a run
    chooses them for its model and data (`plaudit.settings.starting_points`), and logs what it chose."""

    learning_rate: float | None = None
    """Default: chosen for the policy's size, and for adapters or all parameters. The log says which."""
    batch_size: int | None = None
    """Samples per step, over all processes. Default: 128, or less if there are fewer prompts."""
    responses_per_prompt: int = 1
    """Responses to each prompt of a step, each with draws of its own. A step has batch_size / responses_per_prompt
    prompts; the responses to one stay in one mini-batch and one process."""
    mini_batch_size: int | None = None
    """Samples per gradient accumulation step. Default: the batch; at most 128, and so that it divides the batch."""
    gradient_accumulation_steps: int = 1
    """Mini-batches per optimizer step."""
    micro_batch_size: int | None = None
    """Samples per forward pass in updates. Default: as many of a mini-batch as fit into memory. Does not affect
    results."""
    ppo_epochs: int = 4
    """Passes over the samples of a step."""
    adap_kl_ctrl: bool = True
    """Adapt the coefficient of the KL penalty so that the KL approaches target. If off, it stays at init_kl_coef."""
    init_kl_coef: float | None = None
    """Weight of the KL penalty at the start. Default: 0.05."""
    target: float = 6.0
    """Target of the adaptive KL controller: KL summed over a response, mean over samples."""
    horizon: float = 10_000.0
    """Number of samples over which the controller may change the coefficient by about 20 %."""
    kl_penalty: KLPenalty = "kl"
    """Estimator of each token's KL to the reference in the reward: `kl` is the difference of log-probabilities, `abs`
    its absolute value, `mse` half its square, `k3` an estimator that is never negative, `full` the exact KL over the
    vocabulary. `full` doesn't depend on the sampled token, so it punishes earlier tokens alone: with it, a policy may
    move much farther."""
    kl_loss_coef: float = 0.0
    """Coefficient of a KL term in the loss, beside the KL in the reward. For the loss alone, set init_kl_coef to 0."""
    kl_loss: KLLoss = "k3"
    """Estimator of the KL term in the loss."""
    kl_loss_weighted: bool = True
    """Weight each token's KL term with its ratio, so that its gradient in expectation is that of KL(policy, reference).
    Turn off for GRPO's term."""
    advantage_estimator: AdvantageEstimator = "gae"
    """`gae` with a value head; or without one, by comparison with the other responses to the prompt: `rloo` (reward
    minus the mean of the others), `dr_grpo` (minus the mean of all), `grpo` (and over their standard deviation)."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation, for advantages and returns."""
    value_lam: float | None = None
    """Lambda of the returns that the value head learns (decoupled GAE). Default: lam."""
    lam_alpha: float | None = None
    """Length-adaptive lambda of the advantages, in place of lam: 1 - 1 / (lam_alpha x response length), at least 0."""
    cliprange: float = 0.2
    """Clip range of the ratio between the new and the old probability of a token."""
    cliprange_upper: float | None = None
    """Clip range of the ratio above 1 (clip-higher). Default: cliprange."""
    dual_clip: float | None = None
    """Upper bound of the ratio in the loss of tokens with a negative advantage, above 1 (dual clip). Default: none."""
    cliprange_value: float = 0.2
    """Clip range of a value around its value in the rollout."""
    loss_aggregation: Aggregation = "token_mean"
    """How the losses of a mini-batch's tokens are combined: their mean, the mean over responses of each one's mean, or
    the mean over responses of each one's sum divided by loss_tokens."""
    loss_tokens: int | None = None
    """Divisor of each response's sum with loss_aggregation=sequence_sum, for example generation.max_new_tokens."""
    vf_coef: float = 0.1
    """Coefficient of the value loss."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus; 0 turns it off."""
    ratio_threshold: float = 10.0
    """Mini-batches whose mean ratio exceeds this are skipped."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm. Default: not clipped."""
    early_stopping: bool = False
    """End an update early when the policy has moved too far (target_kl)."""
    target_kl: float = 1.0
    """With early stopping: the update ends after an epoch whose KL exceeds 1.5 times this."""
    use_score_scaling: bool = False
    """Divide rewards by their running standard deviation."""
    use_score_norm: bool = False
    """With use_score_scaling: also subtract their running mean."""
    score_clip: float | None = None
    """Clip rewards to plus and minus this. Default: not clipped."""
    whiten_rewards: bool = False
    """Scale token rewards to standard deviation 1 over the batch; their mean stays."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    value_head_learning_rate: float | None = None
    """Learning rate of the value head and a separate value model, where there is one. Default: the policy's."""
    value_warmup_steps: int = 0
    """First PPO steps that train the value head and a value model alone. The policy and the KL coefficient stay as they
    are."""
    lr_schedule: LearningRateSchedule = "constant"
    """Decay of the learning rate to 0 over the run's steps, after the warm-up."""
    lr_warmup_steps: int = 0
    """PPO steps over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        positive(
            self,
            "learning_rate",
            "batch_size",
            "mini_batch_size",
            "responses_per_prompt",
            "gradient_accumulation_steps",
            "micro_batch_size",
            "ppo_epochs",
            "target",
            "horizon",
            "cliprange",
            "cliprange_upper",
            "lam_alpha",
            "loss_tokens",
            "cliprange_value",
            "ratio_threshold",
            "max_grad_norm",
            "target_kl",
            "score_clip",
            "adam_eps",
            "value_head_learning_rate",
        )
        fraction(self, "gamma", "lam", "value_lam", "adam_beta1", "adam_beta2")
        require(self.dual_clip is None or self.dual_clip > 1, f"dual_clip={self.dual_clip} must be greater than 1")
        require(
            (self.loss_aggregation == "sequence_sum") == (self.loss_tokens is not None),
            f"loss_tokens={self.loss_tokens} with loss_aggregation={self.loss_aggregation}: sequence_sum needs "
            "loss_tokens, for example the value of generation.max_new_tokens, and the others take none",
        )
        require(self.value_warmup_steps >= 0, f"value_warmup_steps={self.value_warmup_steps} must be 0 (off) or more")
        require(self.lr_warmup_steps >= 0, f"lr_warmup_steps={self.lr_warmup_steps} must be 0 or more")
        require(self.kl_loss_coef >= 0, f"kl_loss_coef={self.kl_loss_coef} must be 0 (off) or more")
        require(
            self.kl_loss != "k1" or self.kl_loss_weighted,
            "kl_loss=k1 with kl_loss_weighted=False has a gradient of zero in expectation: weight it, or take k2 or k3",
        )
        require(
            self.init_kl_coef is None or self.init_kl_coef >= 0, f"init_kl_coef={self.init_kl_coef} must be 0 or more"
        )
        mini_batch_size = 1 if self.mini_batch_size is None else self.mini_batch_size
        per_optimizer_step = mini_batch_size * self.gradient_accumulation_steps
        require(
            self.batch_size is None or self.batch_size % per_optimizer_step == 0,
            f"mini_batch_size={mini_batch_size} x gradient_accumulation_steps={self.gradient_accumulation_steps} "
            f"= {per_optimizer_step} does not divide batch_size={self.batch_size}",
        )
        require(
            self.mini_batch_size is None or self.mini_batch_size % self.responses_per_prompt == 0,
            f"responses_per_prompt={self.responses_per_prompt} does not divide mini_batch_size={self.mini_batch_size}: "
            "the responses to one prompt stay in one mini-batch",
        )
        if self.critic_free:
            self._require_critic_free()
        require(
            self.use_score_scaling or not self.use_score_norm,
            "use_score_norm=True needs use_score_scaling=True",
        )

    @property
    def critic_free(self) -> bool:
        """Whether advantages need no value head."""
        return self.advantage_estimator != "gae"

    def _require_critic_free(self) -> None:
        """Raises `ConfigError` for a setting that needs a value head or advantages for each token."""
        chosen = f"advantage_estimator={self.advantage_estimator}"
        require(
            self.responses_per_prompt > 1,
            f"{chosen} compares the responses to one prompt: give responses_per_prompt=2 or more, not "
            f"{self.responses_per_prompt}",
        )
        for name, off in (
            ("value_lam", None),
            ("value_warmup_steps", 0),
            ("lam_alpha", None),
            ("whiten_rewards", False),
            ("gamma", 1.0),
        ):
            value = getattr(self, name)
            require(value == off, f"{name}={value} needs advantage_estimator=gae: {chosen} has no use for it")


@dataclass(frozen=True)
class PPOHyperparameters(PPOSettings):
    """All hyperparameters of PPO, none left open. The defaults are those of the published recipe."""

    learning_rate: float = 1.41e-5
    batch_size: int = 128
    mini_batch_size: int = 128
    init_kl_coef: float = 0.2


@dataclass(frozen=True)
class PenaltySettings:
    """Penalties subtracted from a response's reward before the update. All are off by default."""

    missing_eos: float = 0.0
    """Penalty for a response that reached its length limit before the end of text. Frequent with drawn lengths."""
    per_token: float = 0.0
    """Penalty for each response token beyond free_tokens."""
    free_tokens: int = 0
    """Response tokens without a penalty."""

    def __post_init__(self) -> None:
        for name in ("missing_eos", "per_token", "free_tokens"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), f"{name}={value} must be 0 (off) or more")


@dataclass(frozen=True)
class PPOConfig:
    """Stage 3: PPO with rewards from a reward service."""

    stage: ClassVar = "ppo"
    """The name of its part in a settings file for all stages."""

    policy: str = "lvwerra/gpt2-imdb"
    """Directory or hub id of the causal language model to train."""
    output_dir: Path = Path("runs/ppo")
    """Directory for checkpoints, metrics and the trained policy. The run locks it."""
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    penalties: PenaltySettings = field(default_factory=PenaltySettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    check: bool = False
    """Dry run: load everything, take one step in memory, and report what a run would do and how much time and memory it
    needs."""
    steps: int | None = None
    """PPO steps. Default: one pass over the prompts, but at least 50 steps."""
    resume: str | None = None
    """`auto` continues from the newest checkpoint in output_dir, if there is one. Or the directory of a checkpoint."""
    checkpoint_every: int = 50
    """Steps between checkpoints. A checkpoint is also saved when the run is stopped or rewards stay unavailable."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    log_samples_every: int = 10
    """Steps between tables of sampled responses in the trackers; 0 turns them off."""
    merge: bool = False
    """Also write OUTPUT_DIR/merged, the model with merged adapters, for plain transformers."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub to upload the finished result to, such as `me/my-model`. Needs a token
    (HF_TOKEN or `hf auth login`); HF_ENDPOINT names another hub."""
    hub_private: bool = False
    """Create that repository as a private one. One that exists keeps its visibility."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers for metrics, in addition to metrics.jsonl: tensorboard, wandb, trackio, mlflow, ... (accelerate's
    names)."""
    tracker_project: str = "plaudit"
    """Name of the project (wandb, trackio, swanlab, comet_ml, clearml) or experiment (mlflow, aim) in the trackers."""
    tracker_run: str | None = None
    """Name of this run in the trackers (wandb, trackio, swanlab, clearml, mlflow). Default: the tracker chooses one."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`. Default: a GPU if there is one."""
    collective_timeout_s: float = 600.0
    """With several processes: timeout of collective operations, in addition to the time that rewards may take."""
    seed: int = 0
    """Of sampling, the order of prompts and new weights."""

    def __post_init__(self) -> None:
        positive(self, "steps", "checkpoint_every", "keep_checkpoints", "collective_timeout_s")
        check_push(self)
        require(
            not (self.ppo.critic_free and self.model.value_source != "shared"),
            f"ppo.advantage_estimator={self.ppo.advantage_estimator} uses no values: leave out "
            f"model.value_model={self.model.value_source}",
        )
        require(self.log_samples_every >= 0, f"log_samples_every={self.log_samples_every} must be 0 (off) or more")
