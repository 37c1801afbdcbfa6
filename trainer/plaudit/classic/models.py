"""Language models with a value head, as programs load, read and save them. The step works on `policy_of` such a model.

Failure mode: weights that transformers loads in another precision than the program expects.
"""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from plaudit import demo_models
from plaudit.classic.arguments import generation_arguments, loading_arguments
from plaudit.classic.hub import upload
from plaudit.classic.references import create_reference_model
from plaudit.classic.value_head_files import saved_value_head, tensors_named
from plaudit.errors import ConfigError
from plaudit.policy.model import Policy
from plaudit.policy.reading import reading
from plaudit.policy.saving import VALUE_HEAD_FILE
from plaudit.policy.transformer import compute_quantised_layers_in_one_way
from plaudit.run.runtime import exclusive
from plaudit.run.storage import replaced_model

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "ValueHead",
    "create_reference_model",
    "policy_of",
]
KBIT_OPTIONS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs", "layer_norm_names")
"""Arguments of `peft.prepare_model_for_kbit_training` that `from_pretrained` passes on."""


class ValueHead(nn.Module):
    """A number for each state: one linear layer, `summary`, in fp32 behind a dropout that PPO leaves off."""

    def __init__(self, width: int, summary_dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(width, 1, dtype=torch.float32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] gives [..., 1]."""
        values: Tensor = self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))
        return values


class PreTrainedModelWrapper(nn.Module):
    """A Hugging Face model, `pretrained_model`, and a value head, `v_head`."""

    transformers_parent_class: ClassVar[Any] = transformers.AutoModelForCausalLM
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_initializer_range",
        "v_head_init_strategy",
    )

    def __init__(
        self,
        pretrained_model: Any,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
    ) -> None:
        """`v_head_init_strategy="normal"` draws the value head's weights with `v_head_initializer_range`.

        Raises:
            ConfigError: the model has no language-model head, or prompts that are learned in place of weights.
        """
        super().__init__()
        self.pretrained_model = pretrained_model
        self.is_peft_model = isinstance(pretrained_model, peft.PeftModel)
        if self.is_peft_model and isinstance(pretrained_model.active_peft_config, peft.PromptLearningConfig):
            raise ConfigError(
                f"{type(pretrained_model.active_peft_config).__name__} learns a prompt, which the step has no place "
                "for: use LoraConfig"
            )
        bare = pretrained_model.get_base_model() if self.is_peft_model else pretrained_model
        head = bare.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{type(bare).__name__} has no language-model head: load it as AutoModelForCausalLM")
        self.v_head = ValueHead(getattr(head, "in_features", head.weight.shape[-1]), summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ConfigError(f"v_head_init_strategy={v_head_init_strategy!r}: give 'normal', or None for nn.Linear's")
        self.v_head.to(head.weight.device)
        self.policy_adapter_name = "default"
        self.rm_adapter_name: str | None = None
        self.score: nn.Linear | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """A model with a value head: from a directory, a hub id, a transformers model or a `peft.PeftModel`.

        `peft_config` puts fresh adapters on it, `reward_adapter` loads adapters with a `score` head as a reward model
        (`compute_reward_score`), `is_trainable` lets the adapters of an adapter directory learn. The names in
        `supported_args` go to the value head, everything else to transformers. Weights are fp32 unless `torch_dtype`
        says otherwise. A value head that was saved with the model is found again.

        Raises:
            ConfigError: arguments that don't go together, or something that is no such model.
        """
        peft_config = kwargs.pop("peft_config", None)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        head_options = {name: kwargs.pop(name) for name in cls.supported_args if name in kwargs}
        kbit_options = {name: kwargs.pop(name) for name in KBIT_OPTIONS if name in kwargs}
        source, saved_head = pretrained_model_name_or_path, None
        if peft_config is not None and not isinstance(peft_config, peft.PeftConfig):
            raise ConfigError(f"peft_config={peft_config!r} must be a peft.PeftConfig, such as peft.LoraConfig")
        if isinstance(source, str | Path):
            source = demo_models.resolve(source)
            with reading(source):
                model = cls._load(source, model_args, kwargs, is_trainable=is_trainable)
                saved_head = saved_value_head(source)
            if peft_config is not None and isinstance(model, peft.PeftModel):
                warnings.warn(f"peft_config is left out: {source!r} has adapters already", stacklevel=2)
        elif isinstance(source, transformers.PreTrainedModel | peft.PeftModel):
            model = source
        else:
            raise ConfigError(
                f"from_pretrained of a {type(source).__name__}: give a directory, a hub id, a transformers model or a "
                "peft.PeftModel"
            )
        if peft_config is not None and not isinstance(model, peft.PeftModel):
            if _is_quantised(model):
                with warnings.catch_warnings():
                    # peft still calls checkpointing by its old name.
                    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)
                    kbit_options.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
                    model = peft.prepare_model_for_kbit_training(model, **kbit_options)
            model = peft.get_peft_model(model, copy.deepcopy(peft_config))  # peft writes into it
        if _is_quantised(model):
            compute_quantised_layers_in_one_way(model)
        wrapper = cls(model, **head_options)
        if reward_adapter is not None:
            wrapper._add_reward_adapter(reward_adapter, reward_adapter_name)
        if saved_head is not None:
            wrapper.v_head.summary.load_state_dict(saved_head)
        return wrapper

    @classmethod
    def _load(cls, source: str, model_args: tuple[Any, ...], options: dict[str, Any], *, is_trainable: bool) -> Any:
        options = loading_arguments(options)
        dtype = options.pop("torch_dtype", None)
        options.setdefault("dtype", torch.float32 if dtype is None else dtype)
        try:
            adapters = peft.PeftConfig.from_pretrained(source)
        except (ValueError, OSError):
            return cls.transformers_parent_class.from_pretrained(source, *model_args, **options)
        base = demo_models.resolve(adapters.base_model_name_or_path)
        model = cls.transformers_parent_class.from_pretrained(base, *model_args, **options)
        return peft.PeftModel.from_pretrained(model, source, is_trainable=is_trainable)

    # The parts of the wrapped model that programs use

    @property
    def config(self) -> Any:
        """The wrapped model's."""
        return self.pretrained_model.config

    @property
    def generation_config(self) -> Any:
        """The wrapped model's."""
        return self.pretrained_model.generation_config

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self.v_head.summary.weight.device

    @property
    def is_loaded_in_8bit(self) -> bool:
        """Whether bitsandbytes holds the base weights in 8 bits."""
        return bool(getattr(self.pretrained_model, "is_loaded_in_8bit", False))

    @property
    def is_loaded_in_4bit(self) -> bool:
        """Whether bitsandbytes holds the base weights in 4 bits."""
        return bool(getattr(self.pretrained_model, "is_loaded_in_4bit", False))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's `generate`, with arguments as `generation_arguments` has them."""
        return self.pretrained_model.generate(*args, **generation_arguments(kwargs))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Recomputes activations in the backward pass of updates."""
        # transformers 5.23 gave it this name; before, it has only the other.
        enable = getattr(self.pretrained_model, "activation_checkpointing_enable", None)
        enable = enable or self.pretrained_model.gradient_checkpointing_enable
        enable(dict(gradient_checkpointing_kwargs or {"use_reentrant": False}))

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations for the backward pass again."""
        disable = getattr(self.pretrained_model, "activation_checkpointing_disable", None)
        (disable or self.pretrained_model.gradient_checkpointing_disable)()

    def enable_input_require_grads(self) -> None:
        """Lets gradients pass frozen embeddings, as checkpointing by reentrant passes needs it."""
        self.pretrained_model.enable_input_require_grads()

    def print_trainable_parameters(self) -> None:
        """How much of it learns, value head included."""
        print(policy_line(self))

    # Files

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Adapters, or the whole model, as transformers and peft load them; the value head in a file of its own.

        The new files replace an earlier model's together.

        Raises:
            NotWritten: with the path, the reason and the room that is left.
        """
        directory = Path(save_directory)
        with exclusive(directory), replaced_model(directory) as beside:
            self.write(beside, **kwargs)

    def write(self, directory: Path, **kwargs: Any) -> None:
        """`save_pretrained` into a directory of the caller's own; `kwargs` are those of the wrapped model's."""
        self.pretrained_model.save_pretrained(str(directory), **kwargs)
        head = {name: tensor.detach().cpu() for name, tensor in self.v_head.summary.state_dict().items()}
        save_file(head, directory / VALUE_HEAD_FILE)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes; `kwargs` are `private`, `token` and `commit_message`."""
        return upload(repo_id, self.write, **kwargs)

    # Reward adapters

    def _add_reward_adapter(self, source: str, name: str) -> None:
        if not self.is_peft_model:
            raise ConfigError("reward_adapter needs a model with adapters: give peft_config too")
        self.pretrained_model.load_adapter(source, name, is_trainable=False)
        weights = tensors_named("score.", source, "adapter_model.safetensors", "adapter_model.bin")
        if not weights:
            raise ConfigError(
                f"reward_adapter={source!r} has no weight of a `score` head: train it as a sequence classifier "
                "(plaudit reward-model, or peft with task_type='SEQ_CLS')"
            )
        labels, width = weights["weight"].shape
        score = nn.Linear(width, labels, bias="bias" in weights, device=self.device)
        score.load_state_dict(weights)
        self.score, self.rm_adapter_name = score.requires_grad_(False), name

    @property
    def supports_rm_adapter(self) -> bool:
        """Whether `compute_reward_score` can be asked."""
        return self.score is not None

    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The reward adapter's scores at every token, [B, L, labels]; the policy's adapter is active again afterwards.

        Raises:
            ConfigError: it was loaded without `reward_adapter`.
        """
        if self.score is None or self.rm_adapter_name is None:
            raise ConfigError("there is no reward adapter: load the model with reward_adapter='DIRECTORY'")
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.pretrained_model.set_adapter(self.rm_adapter_name)
        self.pretrained_model.eval()
        try:
            output = self.pretrained_model(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs
            )
            scores: Tensor = self.score(output.hidden_states[-1].to(self.score.weight.dtype))
        finally:
            self.pretrained_model.set_adapter(self.policy_adapter_name)
            for parameter in learning:  # peft lets the active adapter learn, and none of the others
                parameter.requires_grad_(True)
        return scores

    compute_reward_model_score = compute_reward_score


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head. `from_pretrained` makes one."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits [B, L, V] in fp32, the loss if there are `labels`, values [B, L], and the cache if it is asked for."""
        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **kwargs,
        )
        values = self.v_head(output.hidden_states[-1].to(self.device)).squeeze(-1)
        result = (output.logits.float(), output.loss, values)
        return (*result, output.past_key_values) if return_past_key_values else result


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """Encoder-decoder models are not trained here; the name exists for programs that import it and don't use it."""

    transformers_parent_class = transformers.AutoModelForSeq2SeqLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_encoder_decoder()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> NoReturn:
        """Raises `ConfigError`, which says what to use."""
        _refuse_encoder_decoder()


def _refuse_encoder_decoder() -> NoReturn:
    raise ConfigError(
        "plaudit trains causal language models, and an encoder-decoder model is none: use "
        "AutoModelForCausalLMWithValueHead with a decoder (GPT-2, Llama, Qwen), or stay with TRL 0.11 for T5 and BART"
    )


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)


def policy_of(model: PreTrainedModelWrapper, *, reference: Any = None) -> Policy:
    """The policy that the step trains: the wrapped model and its value head, the same tensors."""
    policy = Policy(model.pretrained_model, reference=reference)
    policy.v_head = model.v_head.summary.float()
    return policy


def policy_line(model: PreTrainedModelWrapper) -> str:
    """`trainable params: … || all params: … || trainable%: …` of model and value head, as `plaudit ppo` prints it."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    learning, everything = sum(n for n, learns in counts if learns), sum(n for n, _ in counts)
    return (
        f"trainable params: {learning:,} || all params: {everything:,} || trainable%: {100 * learning / everything:.4f}"
    )


def _is_quantised(model: Any) -> bool:
    bare = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return bool(getattr(bare, "is_quantized", False))
