"""The policy: a causal language model with a value head, and the reference it is held to.

Failure modes: a log-probability that depends on padding; a reference that is the policy itself; an adapter that only
this program can load.
"""

import contextlib
import importlib.util
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from plaudit import demo_models
from plaudit.errors import ConfigError, NotAsSaved, NotFinite
from plaudit.policy.head import fp32_logits
from plaudit.policy.lora_targets import default_targets, require_adaptable, unadaptable
from plaudit.policy.packing import ModelInput, attention_dtype, packed, padded, takes_own_mask, worth_packing
from plaudit.policy.reading import reading, settle
from plaudit.policy.samples import Samples
from plaudit.policy.tokenizer import Tokenizer
from plaudit.ppo import distributions
from plaudit.settings.policy import LoraSettings, ModelSettings, Quantization

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_DIRECTORY = "value_model"
COMPILER = "inductor"


class ModelNotFound(ConfigError):
    """No model at this path, and no hub model of this name within reach."""


@dataclass(frozen=True)
class ResponseOutputs:
    """What one forward pass says about each response token; 0 on padding."""

    logprobs: Tensor
    """[B, T] fp32, of the tokens that were sampled, under the distribution that was sampled from."""
    values: Tensor
    """[B, T] fp32, of the state before each token."""
    entropy: Tensor
    """[B, T] fp32, of the distribution each token was drawn from."""


@dataclass(frozen=True)
class PolicyWeights:
    """Whole tensors by their names, as `Policy.save` writes them."""

    model: dict[str, Tensor]
    """Of the adapters, or of the whole model where there are none."""
    value_head: dict[str, Tensor]
    value_model: dict[str, Tensor]
    """Empty where there is none."""


class Policy(nn.Module):
    """A causal language model, adapters if it has any, and a value head.

    The reference is the same model with its adapters off, or `reference` when every parameter learns. Dropout is
    switched off in the model for good: with it, the ratio would compare two different networks, and the classic
    trainer's updates had none either. `train()` therefore changes only what gradient checkpointing looks at.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: nn.Module | None = None,
        value_model: PreTrainedModel | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """`model` is any Hugging Face causal LM, bare or as a `peft.PeftModel`; `autocast` the dtype of its passes.

        `value_model` is a headless transformer of its own for the values; without it they share the policy's.
        """
        super().__init__()
        self.model: Any = model
        self.value_model = value_model
        head = self._head_of(model)
        width = head.in_features if value_model is None else value_model.config.hidden_size
        self.v_head = nn.Linear(width, 1, dtype=torch.float32, device=head.weight.device)
        nn.init.zeros_(self.v_head.weight)
        nn.init.zeros_(self.v_head.bias)
        self.autocast = autocast
        # BLOOM, MPT and others read positions off the attention mask and take none.
        self._takes_positions = "position_ids" in inspect.signature(self.language_model.forward).parameters
        disable_dropout(self)
        # Not a submodule: it must neither be trained, nor saved, nor wrapped with the policy.
        self._reference: list[Any] = []
        if self.device.type == "cuda":
            fuse_activations(self)
        self._takes_own_mask = takes_own_mask(self.language_model)
        self._takes_own_mask = self._takes_own_mask and self._agrees(
            lambda samples: padded(samples, takes_positions=self._takes_positions, mask_dtype=self.mask_dtype)
        )
        # By their positions, most architectures tell the samples of a row apart.
        self._packs = self._takes_positions and self._agrees(
            lambda samples: packed(samples, mask_dtype=self.mask_dtype)
        )
        self._last_input: tuple[Samples, ModelInput] | None = None
        if reference is not None:
            self.use_reference(reference)

    def use_reference(self, model: nn.Module) -> None:
        """Holds the policy to this model from now on; its parameters are frozen."""
        disable_dropout(model)
        if self.device.type == "cuda":
            fuse_activations(model)
        self._reference[:] = [model.eval().requires_grad_(False)]

    @property
    def has_adapters(self) -> bool:
        """Whether the reference comes from switching adapters off."""
        return isinstance(self.model, peft.PeftModel)

    @property
    def language_model(self) -> PreTrainedModel:
        """The Hugging Face model itself, for `generate` and its configuration; adapters stay active in it."""
        return _bare(self.model)

    @property
    def transformers(self) -> list[PreTrainedModel]:
        """Every transformer that it computes with: the language model, the reference's copy, the values' own."""
        return [self.language_model, *self._reference, *([] if self.value_model is None else [self.value_model])]

    @property
    def device(self) -> torch.device:
        """Where the policy's inputs belong."""
        return self.v_head.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Policy":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for reference in self._reference:
            reference._apply(fn, recurse)
        if self.device.type == "cuda":
            for transformer in self.transformers:
                fuse_activations(transformer)
        return self

    def forward(
        self,
        samples: Samples,
        *,
        temperature: float = 1.0,
        support: Tensor | None = None,
        entropy: bool = True,
    ) -> ResponseOutputs:
        """Scores every response token in one pass; the LM head runs on response positions alone.

        `support` [B, T, V] holds the distribution to the tokens that truncated sampling left (see `support`). Without
        `entropy` that is left at 0.
        """
        flat = self.score(
            self._input_of(samples),
            samples.gather(samples.response_ids),
            temperature=temperature,
            support=None if support is None else samples.gather(support),
            entropy=entropy,
        )
        return ResponseOutputs(samples.spread(flat.logprobs), samples.spread(flat.values), samples.spread(flat.entropy))

    def score(
        self,
        given: ModelInput,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        support: Tensor | None = None,
        entropy: bool = True,
    ) -> ResponseOutputs:
        """`forward` on an input that is made already: everything is [N], for the response tokens [N] of the input.

        `support` is [N, V] here.
        """
        logits, states = self._response_logits(self.model, given)
        if self.value_model is not None:
            states = self._value_states(given)
        logits = distributions.sampling_logits(logits, temperature=temperature, support=support)
        logprobs, entropies = distributions.token_statistics(logits, tokens, entropy=entropy)
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.v_head(states.float()).squeeze(-1)
        return ResponseOutputs(logprobs, values, torch.zeros_like(logprobs) if entropies is None else entropies)

    @property
    def mask_dtype(self) -> torch.dtype | None:
        """What a whole attention mask must be made of; None for a model that makes its own."""
        if not self._takes_own_mask:
            return None
        with self.autocasting():
            return attention_dtype(self.language_model)

    @property
    def packs(self) -> bool:
        """Whether it scores packed rows under a mask of ours, whose shapes can be fixed."""
        return self._packs and self._takes_own_mask

    @torch.no_grad()
    def reference_logprobs(
        self, samples: Samples, *, temperature: float = 1.0, support: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of the response tokens under the reference, [B, T] fp32, 0 on padding."""
        kept = None if support is None else samples.gather(support)
        given, tokens = self._input_of(samples), samples.gather(samples.response_ids)
        return samples.spread(self.reference_score(given, tokens, temperature=temperature, support=kept))

    @torch.no_grad()
    def reference_score(
        self, given: ModelInput, tokens: Tensor, *, temperature: float = 1.0, support: Tensor | None = None
    ) -> Tensor:
        """`reference_logprobs` on an input that is made already, [N]; `support` is [N, V] here."""
        with self.as_reference() as reference:
            logits, _ = self._response_logits(reference, given)
        logits = distributions.sampling_logits(logits, temperature=temperature, support=support)
        return distributions.token_statistics(logits, tokens)[0]

    @torch.no_grad()
    def policy_logits(self, samples: Samples, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
        """Whole sampling distributions of the policy as logits, [N, V] fp32, one for each real response token.

        Large: ask for few rows at a time.
        """
        logits, _ = self._response_logits(self.model, self._input_of(samples))
        return _sampling_logits(logits, samples, temperature, support)

    @torch.no_grad()
    def reference_logits(self, samples: Samples, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
        """Whole sampling distributions of the reference as logits, [N, V] fp32, one for each real response token."""
        with self.as_reference() as reference:
            logits, _ = self._response_logits(reference, self._input_of(samples))
        return _sampling_logits(logits, samples, temperature, support)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The reference model: the frozen copy, or this model with its adapters off for as long as the block runs."""
        if self._reference:
            yield self._reference[0]
        elif self.has_adapters:
            with self.model.disable_adapter():
                yield self.model
        else:
            raise ConfigError(
                "a policy without adapters needs a frozen copy as its reference: Policy(model, reference=…)"
            )

    def support(
        self, samples: Samples, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Tensor | None:
        """The tokens that top-k and top-p left to choose from, [B, T, V] bool, or None where they keep everything.

        Compute it before the first update: later passes of policy and reference are held to the rollout's choices, so
        that a ratio compares probabilities over the same tokens and the KL stays a KL. The sampled token is always
        in, however a tie was rounded.
        """
        if top_k == 0 and top_p == 1.0:
            return None
        kept = distributions.truncation(self.policy_logits(samples, temperature=temperature), top_k=top_k, top_p=top_p)
        return samples.spread(kept.scatter(-1, samples.gather(samples.response_ids).unsqueeze(-1), True), fill=True)

    def _response_logits(self, model: Any, given: ModelInput) -> tuple[Tensor, Tensor]:
        """Logits [N, V] for the real response tokens, and the states [N, H] that the LM head saw."""
        seen: list[Tensor] = []

        def keep_response_states(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0].flatten(0, 1).index_select(0, given.states))
            return (seen[0].unsqueeze(0), *inputs[1:])

        hook = self._head_of(model).register_forward_pre_hook(keep_response_states)
        try:
            with self.autocasting():
                logits = _bare(model)(**given.arguments, use_cache=False).logits
        finally:
            hook.remove()
        return logits.squeeze(0), seen[0]

    def _value_states(self, given: ModelInput) -> Tensor:
        assert self.value_model is not None
        with self.autocasting():
            states: Tensor = self.value_model(**given.arguments, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, given.states)

    def _input_of(self, samples: Samples) -> ModelInput:
        # Policy, reference and values are asked about the same samples in turn.
        if self._last_input is None or self._last_input[0] is not samples:
            if self._packs and worth_packing(samples):
                given = packed(samples, mask_dtype=self.mask_dtype)
            else:
                # On a CPU, transformers' look at the mask costs nothing and may save the mask.
                mask_dtype = None if self.device.type == "cpu" else self.mask_dtype
                given = padded(samples, takes_positions=self._takes_positions, mask_dtype=mask_dtype)
            self._last_input = samples, given
        return self._last_input[1]

    @torch.no_grad()
    def _agrees(self, make_input: Callable[[Samples], ModelInput]) -> bool:
        """Whether an input of another form gives the logits of plain padded rows. Each model is asked, not believed."""
        if self.device.type == "meta":
            return False
        probe = Samples.from_lists([[1, 2, 3], [4, 5]], [[6, 7], [7, 6, 5]], pad_token_id=0, device=self.device)
        plain, _ = self._response_logits(self.model, padded(probe, takes_positions=self._takes_positions))
        try:
            logits, _ = self._response_logits(self.model, make_input(probe))
        except (RuntimeError, TypeError, ValueError):
            return False
        exact = self.autocast is None and self.language_model.dtype == torch.float32
        tolerance = 1e-3 if exact and not getattr(self.language_model, "is_quantized", False) else 3e-2
        return bool((plain - logits).abs().max() < tolerance * plain.std())

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Around generation: the policy's precision, and nothing compiled, since every token has another shape."""

        def in_one_piece(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The last states of all rows lie apart, and torch would multiply them row by row.
            return (inputs[0].contiguous(), *inputs[1:])

        hook = self._head_of(self.model).register_forward_pre_hook(in_one_piece)
        try:
            with torch.compiler.set_stance("force_eager"), self.autocasting():
                yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        """The precision that the policy and its reference compute in; their logits are fp32."""
        # No cache: each weight is cast once a pass anyway, and a recorded graph would keep an old step's copy.
        enabled = self.autocast is not None
        heads = [self._head_of(model) for model in (self.model, *self._reference)]
        with (
            fp32_logits(*heads, autocast=self.autocast),
            torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled, cache_enabled=False),
        ):
            yield

    @staticmethod
    def _head_of(model: Any) -> Any:
        return _bare(model).get_output_embeddings()

    def trainable_parameters_line(self) -> str:
        """How much of the policy learns, in the words of peft; tied weights count once."""
        everything = sum(_numel(p) for p in self.parameters())
        learning = sum(_numel(p) for p in self.parameters() if p.requires_grad)
        share = 100 * learning / everything
        return f"trainable params: {learning:,} || all params: {everything:,} || trainable%: {share:.4f}"

    def reference_line(self) -> str:
        """What the reference is and what it costs."""
        if not self._reference:
            return "the reference is the same weights with the adapters off: no second copy"
        mib = sum(p.numel() * p.element_size() for p in self._reference[0].parameters()) / 2**20
        why = "the adapters had learnt before" if self.has_adapters else "every parameter learns"
        return f"{why}, so the reference is a frozen copy of the weights: another {mib:,.0f} MiB"

    def save(self, directory: Path, weights: PolicyWeights | None = None) -> None:
        """Adapters that `peft.PeftModel.from_pretrained` loads, or a whole transformers model; and the value head.

        `weights` are its own; give them where it holds only a part of each (`Processes.full_weights_on_main`).
        """
        self.model.save_pretrained(directory, state_dict=weights and weights.model)
        if self.value_model is not None:
            own = directory / VALUE_MODEL_DIRECTORY
            self.value_model.save_pretrained(own, state_dict=weights and weights.value_model)
        head = self.v_head.state_dict() if weights is None else weights.value_head
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, directory / VALUE_HEAD_FILE)

    def check_saved(self, directory: Path, weights: PolicyWeights | None = None) -> None:
        """Proves that `directory` holds what `save` was given: every tensor is read again, and is finite.

        Raises:
            NotFinite: a weight is not finite.
            NotAsSaved: a file lacks a tensor, or holds another.
        """
        if self.has_adapters:
            whole = peft.get_peft_model_state_dict(self.model, state_dict=weights and weights.model)
        else:
            whole = _as_saved(self.model, None if weights is None else weights.model)
        head = self.v_head.state_dict() if weights is None else weights.value_head
        _require_saved(directory, {**whole, **head}, some_are_tied=not self.has_adapters)
        if self.value_model is not None:
            own = _as_saved(self.value_model, None if weights is None else weights.value_model)
            _require_saved(directory / VALUE_MODEL_DIRECTORY, own, some_are_tied=True)

    def load_value_head(self, directory: Path) -> None:
        """The value head that `save` wrote."""
        self.v_head.load_state_dict(load_file(directory / VALUE_HEAD_FILE))

    def merge(self, directory: Path, weights: PolicyWeights | None = None) -> None:
        """Writes the model with its adapters folded in, as a directory that plain transformers loads."""
        directory.mkdir(parents=True, exist_ok=True)
        if not self.has_adapters:
            self.save(directory, weights)
            self.check_saved(directory, weights)
            return
        with tempfile.TemporaryDirectory(dir=directory) as adapters:
            self.save(Path(adapters), weights)
            merge_adapters(Path(adapters), directory)


def _as_saved(model: PreTrainedModel, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """A whole model's tensors under the names and in the shapes that transformers saves them in, experts one by one."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict() if weights is None else weights)
    return saved


def _require_saved(directory: Path, expected: Mapping[str, Tensor], *, some_are_tied: bool) -> None:
    """Raises `NotFinite` or `NotAsSaved` unless a directory's files hold these tensors; of tied ones, one is enough."""
    read = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    require_finite(read.items(), str(directory))
    lacking = [] if some_are_tied else sorted(expected.keys() - read.keys())
    differing = sorted(n for n in read if n not in expected or not torch.equal(read[n], expected[n].cpu()))
    if lacking or differing or not read:
        problem = f"{(lacking or differing)[0]} is not in it" if read else "there are no weights in it"
        raise NotAsSaved(f"{directory} was not written as it should be: {problem}")


def _bare(model: Any) -> Any:
    """The Hugging Face model in a model that may have adapters. They act in it; only their switches are outside."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _sampling_logits(logits: Tensor, samples: Samples, temperature: float, support: Tensor | None) -> Tensor:
    kept = None if support is None else samples.gather(support)
    return distributions.sampling_logits(logits, temperature=temperature, support=kept)


def _numel(parameter: nn.Parameter) -> int:
    # A 4-bit weight is stored two to a byte; its quantisation state knows the real shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability in the model to 0, in modules and plain attributes; the config is left alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search(r"dropout|pdrop", name):
                setattr(module, name, 0.0)


def fuse_activations(model: nn.Module) -> None:
    """GPT-2's GELU as one kernel in place of eight: the same tanh approximation, equal to a rounding of fp32."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def add_lora(
    model: PreTrainedModel,
    lora: LoraSettings,
    *,
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
) -> peft.PeftModel:
    """Wraps the model with fresh adapters, which start as the identity. `modules_to_save` learn whole beside them.

    Raises:
        ConfigError: no adapters can be put on it.
    """
    targets = list(lora.target_modules) if lora.target_modules else default_targets(model)
    reasons = unadaptable(model)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task_type,
        modules_to_save=list(modules_to_save) or None,
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"lora: no adapters can be put on {type(model).__name__} ({' '.join(str(error).split()):.200}); name "
            "others with --lora.target-modules, try --lora.dropout 0, or train all parameters with --lora.no-enabled"
        ) from error
    remedy = "leave that one out, or give no --lora.target-modules to have layers chosen that can be adapted"
    require_adaptable(adapted.targeted_module_names, reasons, "lora.target_modules", remedy)
    return adapted


def _with_adapters(base: PreTrainedModel, directory: str | Path, *, is_trainable: bool = False) -> peft.PeftModel:
    """The base with the adapters in a directory. Raises `ConfigError` if they could not be folded in."""
    reasons = unadaptable(base)
    model = peft.PeftModel.from_pretrained(base, str(directory), is_trainable=is_trainable)
    require_adaptable(model.targeted_module_names, reasons, str(directory), "train adapters on other layers")
    return model


def load_policy(
    path: str | Path,
    lora: LoraSettings | None = None,
    settings: ModelSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Policy:
    """The policy in a directory, or of a hub id: a whole model, or adapters to go on training (with their base).

    A value head saved beside it is loaded too. `lora` off loads a second, frozen copy as the reference. The reference
    of PPO's own adapters, which a value head tells, is their base; other adapters are a stage before PPO, and the
    reference is a frozen copy of the model with them folded in. A separate value model is the one saved beside the
    policy, or else a copy of the policy's start. Raises `ModelNotFound`.
    """
    with reading(path):
        return _load_policy(path, lora or LoraSettings(), settings or ModelSettings(), dtype=dtype, device=device)


def _load_policy(
    path: str | Path, lora: LoraSettings, settings: ModelSettings, *, dtype: torch.dtype, device: torch.device | str
) -> Policy:
    quantization = settings.quantization
    directory = Path(path)
    base: str | Path = path
    reference = value_model = None
    if is_adapters(directory):
        base = base_of(directory)
        whole = load_causal_lm(base, dtype=dtype, quantization=quantization, device=device)
        model = _with_adapters(whole, directory, is_trainable=True)
        if not (directory / VALUE_HEAD_FILE).is_file():
            reference = load_whole_causal_lm(path, device=device).to(dtype)
    elif lora.enabled:
        model = add_lora(load_causal_lm(path, dtype=dtype, quantization=quantization, device=device), lora)
    elif quantization is not None:
        raise ConfigError(f"quantization={quantization} trains adapters only: lora.enabled=False cannot go with it")
    else:
        model = load_causal_lm(path, dtype=dtype, device=device)
        reference = load_causal_lm(path, dtype=dtype, device=device)
    if settings.separate_value_model:
        own = directory / VALUE_MODEL_DIRECTORY
        value_model = transformers.AutoModel.from_pretrained(
            demo_models.resolve(own if own.is_dir() else base), dtype=dtype
        ).to(device)
    policy = Policy(
        model, reference=reference, value_model=value_model, autocast=torch.bfloat16 if settings.bf16 else None
    )
    if (directory / VALUE_HEAD_FILE).is_file():
        policy.load_value_head(directory)
    if settings.compile:
        policy.language_model.base_model.compile(backend=COMPILER, dynamic=True)
    if settings.gradient_checkpointing:
        for transformer in filter(None, (policy.language_model, value_model)):
            # transformers 5.23 gave it this name; before, it has only the other.
            enable = getattr(transformer, "activation_checkpointing_enable", None)
            (enable or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
    return policy


def require_no_random_weights(
    model: PreTrainedModel,
    loaded: Mapping[str, Any],
    path: str | Path,
    setting: str,
    *,
    head_may_be_new: bool = False,
) -> None:
    """Raises `ModelNotFound` where transformers made up weights that the files lack, or have in another shape."""
    parameters = dict(model.named_parameters())
    made_up = {*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])} & parameters.keys()
    if head_may_be_new:
        body = f"{model.base_model_prefix}."
        made_up = {name for name in made_up if name.startswith(body) and "pooler" not in name}
    if made_up:
        raise ModelNotFound(
            f"{setting}={str(path)!r}: its files lack {len(made_up)} of the weights of a {type(model).__name__}, for "
            f"example {min(made_up)}, which would be random: name a model that has them"
        )


def is_adapters(path: str | Path) -> bool:
    """Whether this is a directory of adapters, which are nothing without the model they were trained on."""
    settle(path)
    return (Path(demo_models.resolve(path)) / "adapter_config.json").is_file()


def base_of(adapters: str | Path) -> str:
    """The model that the adapters in a directory belong to. Raises `ConfigError` if they don't say."""
    with reading(adapters):
        base = peft.PeftConfig.from_pretrained(demo_models.resolve(adapters)).base_model_name_or_path
    if not base:
        raise ConfigError(f"{adapters}: the adapters do not say which model they belong to")
    return str(base)


def load_whole_causal_lm(
    path: str | Path, *, device: torch.device | str = "cpu", setting: str = "policy"
) -> PreTrainedModel:
    """A bare causal language model in fp32; of a directory of adapters, their base with the adapters folded in."""
    if not is_adapters(path):
        return load_causal_lm(path, device=device, setting=setting)
    with reading(path):
        base = load_causal_lm(base_of(path), device=device, setting=setting)
        # peft freezes the base.
        return _with_adapters(base, demo_models.resolve(path)).merge_and_unload().requires_grad_(True)


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    setting: str = "policy",
) -> PreTrainedModel:
    """A bare causal language model. Raises `ModelNotFound` with one line that names the path."""
    _require_reachable(path, setting)
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"quantization={quantization} needs the package bitsandbytes: pip install bitsandbytes")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": str(device)}
    with reading(path):
        try:
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                demo_models.resolve(path), output_loading_info=True, **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise _not_found(path, "model", error, setting) from error
    require_no_random_weights(model, loaded, path, setting)
    if quantization is None:
        return model.to(device)
    compute_quantised_layers_in_one_way(model)
    return model


def compute_quantised_layers_in_one_way(quantised: PreTrainedModel) -> None:
    """Keeps quantised layers in training mode for good.

    On CPUs bitsandbytes evaluates in another precision than it trains in, so that updates would start with a ratio
    that is not 1. With AVX512-BF16 it would repack 4-bit weights for that, and fail for layers narrower than a block.
    """
    import bitsandbytes

    for module in quantised.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            module.training = True
            module.train = lambda mode=True, module=module: module


def merge_adapters(adapters: Path, directory: Path) -> None:
    """Folds a directory of adapters into the full-precision weights of their base, quantised in training or not."""
    base = load_causal_lm(base_of(adapters), dtype="auto")
    model = _with_adapters(base, adapters).merge_and_unload()
    require_finite(model.named_parameters(), "the merged model")
    model.save_pretrained(directory)
    again = load_causal_lm(directory, dtype="auto").state_dict()
    expected = model.state_dict()
    differing = {name for name in expected if name not in again or not torch.equal(again[name], expected[name])}
    if differing or again.keys() - expected.keys():
        name = min(differing or again.keys() - expected.keys())
        raise NotAsSaved(f"{directory}: the merged model, loaded again, has another {name}")
    value_head = adapters / VALUE_HEAD_FILE
    if value_head.is_file():
        (directory / VALUE_HEAD_FILE).write_bytes(value_head.read_bytes())


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises `NotFinite` with the name of the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NotFinite(f"{what} is not saved: its weight {name} ({tensor.dtype}) is not finite")


def load_tokenizer(path: str | Path, *, setting: str = "policy") -> Tokenizer:
    """The tokenizer in a model's directory or of a hub id, with a pad token; of adapters without one, their base's.

    Raises:
        ModelNotFound: there is none, or only the empty one that transformers makes up where the files are missing.
        ConfigError: it has neither a pad token nor an end-of-text token.
    """
    _require_reachable(path, setting)
    tokenizer: Tokenizer | None = None
    with reading(path):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(demo_models.resolve(path))
        except (OSError, ValueError) as error:
            if not is_adapters(path):
                raise _not_found(path, "tokenizer", error, setting) from error
    words = [] if tokenizer is None else tokenizer(list(_WORDS), add_special_tokens=False)["input_ids"]
    if tokenizer is None or len({tuple(ids) for ids in words if ids}) < 2:
        if is_adapters(path):
            return load_tokenizer(base_of(path), setting=setting)
        raise ModelNotFound(
            f"{setting}={str(path)!r} has no tokenizer that tells words apart ({type(tokenizer).__name__} with "
            f"{0 if tokenizer is None else len(tokenizer)} tokens): copy the tokenizer files (tokenizer.json, or "
            "vocab.json and merges.txt, ...) of the model it was made from into the directory"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"{setting}={str(path)!r}: its tokenizer has neither a pad token nor an end-of-text token: name one "
                'as "eos_token" in its tokenizer_config.json'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_WORDS = ("good", "bad", "A", "C", "1", "2", "хорошо", "плохо", "好", "坏")
"""Any tokenizer knows two of them apart."""


def _require_reachable(path: str | Path, setting: str) -> None:
    """Raises `ModelNotFound` for a directory that isn't there, before the hub is asked about it and tried again."""
    settle(path)
    path = demo_models.resolve(path)
    parent = Path(path).parent
    is_path = Path(path).is_absolute() or len(Path(path).parts) > 2 or str(path).startswith(".")
    if not Path(path).is_dir() and (is_path or (parent != Path() and parent.is_dir())):
        raise ModelNotFound(f"{setting}={str(path)!r}: no such directory; name one with a model in it, or a hub id")


def _not_found(path: str | Path, what: str, error: Exception, setting: str) -> ModelNotFound:
    where = "directory" if Path(path).is_dir() else "directory here, and no hub id that can be reached,"
    reason = " ".join(str(error).split())
    return ModelNotFound(f"{setting}={str(path)!r} is no {where} with a {what} that loads ({reason:.160})")
