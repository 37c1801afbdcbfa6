"""`PPOConfig` of the classic trainer: a mutable dataclass that programs fill by hand, HfArgumentParser or tyro.

Failure mode: a field that a program sets and nothing reads. Every field either reaches the step or says what it is for.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from plaudit.classic.core import flatten_dict
from plaudit.classic.import_utils import is_wandb_available
from plaudit.errors import ConfigError
from plaudit.settings.ppo import PPOHyperparameters


class JSONDict(dict[str, Any]):
    """A dictionary; from the command line, written as JSON."""

    def __init__(self, value: Mapping[str, Any] | str = "{}") -> None:
        super().__init__(json.loads(value) if isinstance(value, str) else value)


if TYPE_CHECKING:
    JSON = dict[str, Any]
else:
    JSON = Annotated[
        JSONDict,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: JSONDict(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        ),
    ]
Derived = Annotated[int | None, tyro.conf.Suppress]
Found = Annotated[bool | None, tyro.conf.Suppress]


@dataclass
class PPOConfig:
    """The settings of `plaudit.classic.PPOTrainer`, under the names of TRL 0.11 and with its defaults."""

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    seed: int = 0
    """Of the value head's start, of sampling, and of the order of samples in each epoch."""
    log_with: str | None = None
    """`wandb`, `tensorboard`, or any other tracker that accelerate knows."""
    task_name: str | None = None
    """For trackers only, as are `model_name`, `query_dataset` and `reward_model`."""
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    """Take from a data set the columns that neither the model takes nor `label`, `query` or `response` names."""
    tracker_kwargs: JSON = field(default_factory=JSONDict)
    accelerator_kwargs: JSON = field(default_factory=JSONDict)
    project_kwargs: JSON = field(default_factory=JSONDict)
    """Of accelerate's ProjectConfiguration; TensorBoard needs its `logging_dir`."""
    tracker_project_name: str = "trl"
    push_to_hub_if_best_kwargs: JSON = field(default_factory=JSONDict)
    """With a `repo_id`: the policy is uploaded whenever the mean score is the highest so far."""
    steps: int = 20_000
    """Samples in all. `total_ppo_epochs` follows; the program's own loop decides when to stop."""
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: Literal["kl", "abs", "mse", "full", "k3"] = "kl"
    target: float = 6.0
    horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    """Samples of a step in each process."""
    forward_batch_size: int | None = None
    """The old name of `mini_batch_size`, which it overrides."""
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    world_size: Derived = None
    """Set by the trainer."""
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    """At every optimizer step; the classic trainer clipped the first one only."""
    optimize_cuda_cache: bool | None = None
    """Accepted and without effect, as is `optimize_device_cache`: when memory runs out, the step takes fewer samples
    at once."""
    optimize_device_cache: bool = False
    early_stopping: bool = False
    target_kl: float = 1.0
    compare_steps: int = 1
    """Steps between two looks at whether the policy is the best so far (`push_to_hub_if_best_kwargs`)."""
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False
    is_encoder_decoder: Found = None
    """Set by the trainer, as are the five fields below."""
    is_peft_model: Found = None
    backward_batch_size: Derived = None
    global_backward_batch_size: Derived = None
    global_batch_size: Derived = None
    total_ppo_epochs: Derived = None
    dataset_num_proc: int | None = None
    """For the program's own use."""

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        self.hyperparameters()
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)
        if self.log_with == "wandb" and not is_wandb_available():
            raise ConfigError("log_with='wandb' needs the package wandb: pip install wandb")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ConfigError(
                f"push_to_hub_if_best_kwargs={dict(self.push_to_hub_if_best_kwargs)} has no repo_id: name the "
                "repository to upload to"
            )

    def hyperparameters(self, world_size: int = 1) -> PPOHyperparameters:
        """What the step computes with, for `world_size` processes of `batch_size` samples each.

        Raises:
            ConfigError: a value that cannot work, such as a mini-batch that does not divide the batch.
        """
        names = {f.name for f in dataclasses.fields(PPOHyperparameters)} & {f.name for f in dataclasses.fields(self)}
        settings = {name: getattr(self, name) for name in names}
        settings["batch_size"] *= world_size
        settings["mini_batch_size"] *= world_size
        return PPOHyperparameters(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields, dictionaries among them flattened with `/`."""
        return flatten_dict(dict(vars(self)))
