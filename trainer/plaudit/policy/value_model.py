"""A transformer of its own for the values: a copy of the policy, or a causal model with the same vocabulary.

A decoder reward model brings its score head, which is where the value head starts: the value of a text is then its
score. Failure modes: values that see tokens which are not written yet, or that read other tokens than the policy's.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.adapters import add_lora, base_of, is_adapters, with_adapters
from plaudit.policy.packing import ModelInput, attention_dtype
from plaudit.policy.pretrained import load_tokenizer, not_found, require_no_random_weights, require_reachable
from plaudit.policy.reading import reading
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.transformer import bare
from plaudit.settings.policy import LoraSettings

SETTING = "model.value_model"


def load_value_model(
    path: str | Path,
    *,
    lora: LoraSettings | None,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
) -> tuple[Any, nn.Linear | None]:
    """The transformer of a causal model without its head, and the score head if it is a decoder reward model.

    With `lora` it gets adapters, and `dtype` is that of its base; otherwise all of it learns, in fp32. A directory that
    a run has written is loaded as it is.

    Raises:
        ModelNotFound: there is no model.
        ConfigError: its tokens see those behind them, or it scores several things.
    """
    if is_adapters(path):
        transformer, _ = _load(base_of(path), dtype, device)
        return with_adapters(transformer, demo_models.resolve(path), is_trainable=True), None
    transformer, score = _load(path, torch.float32 if lora is None else dtype, device)
    _require_causal(transformer, path)
    return transformer if lora is None else add_lora(transformer, lora, task_type="FEATURE_EXTRACTION"), score


def value_states(model: Any, given: ModelInput, *, autocast: torch.dtype | None) -> Tensor:
    """The states [N, H] before the response tokens of an input that was made for another model."""
    transformer, arguments = bare(model), dict(given.arguments)
    mask = arguments.get("attention_mask")
    if "position_ids" not in inspect.signature(transformer.forward).parameters:
        arguments.pop("position_ids", None)
    elif "position_ids" not in arguments and mask is not None:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.autocast(given.states.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        if mask is not None and mask.is_floating_point():
            arguments["attention_mask"] = mask.to(attention_dtype(transformer))
        states: Tensor = transformer(**arguments, use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, given.states)


@torch.no_grad()
def same_states(model: Any, plain: ModelInput, other: ModelInput, *, autocast: torch.dtype | None) -> bool:
    """Whether another form of the same input gives the states of plain padded rows."""
    expected = value_states(model, plain, autocast=autocast)
    try:
        got = value_states(model, other, autocast=autocast)
    except (RuntimeError, TypeError, ValueError):
        return False
    exact = autocast is None and bare(model).dtype == torch.float32
    return bool((expected - got).abs().max() < (1e-3 if exact else 3e-2) * expected.std())


def require_same_vocabulary(path: str | Path, model: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Raises `ConfigError` unless a value model reads every token of the policy as the policy does.

    `tokenizer` is the policy's, and `rows` are the tokens that the policy can write.
    """
    own = load_tokenizer(path, setting=SETTING).get_vocab()
    differing = [token for token, number in tokenizer.get_vocab().items() if own.get(token) != number]
    if differing:
        raise ConfigError(
            f"{SETTING}={str(path)!r} has another vocabulary than the policy: {len(differing)} of the policy's "
            f"{len(tokenizer)} tokens have another number in it or none, for example {min(differing)!r}; name a model "
            "with the policy's tokenizer"
        )
    embedded = bare(model).get_input_embeddings().weight.shape[0]
    if embedded < rows:
        raise ConfigError(
            f"{SETTING}={str(path)!r} has embeddings for {embedded} tokens, and the policy writes {rows}; enlarge it "
            f"with model.resize_token_embeddings({rows}) and save it"
        )


def _load(path: str | Path, dtype: torch.dtype | Literal["auto"], device: torch.device | str) -> tuple[Any, Any]:
    require_reachable(path, SETTING)
    with reading(path):
        try:
            resolved = demo_models.resolve(path)
            names = transformers.AutoConfig.from_pretrained(resolved).architectures or []
            scores = any(name.endswith("ForSequenceClassification") for name in names)
            kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModel
            model, loaded = kind.from_pretrained(resolved, output_loading_info=True, dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise not_found(path, "model", error, SETTING) from error
    require_no_random_weights(model, loaded, path, SETTING)
    transformer = model.to(device).base_model
    transformer.name_or_path = model.name_or_path
    return transformer, _score_head(model, path) if scores else None


def _score_head(model: Any, path: str | Path) -> nn.Linear | None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        return None
    if head.out_features != 1:
        raise ConfigError(
            f"{SETTING}={str(path)!r} scores {head.out_features} labels ({', '.join(model.config.id2label.values())}), "
            "and a value is one number: name a reward model with one label, or a language model"
        )
    return head


@torch.no_grad()
def _require_causal(transformer: Any, path: str | Path) -> None:
    """Raises `ConfigError` if a state depends on a token behind it."""
    device = transformer.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device)
    transformer.eval()
    states = transformer(input_ids=ids).last_hidden_state[:, :3].float()
    if bool((states[0] - states[1]).abs().max() > 1e-4 * states.std()):
        raise ConfigError(
            f"{SETTING}={str(path)!r} is no left-to-right model ({type(transformer).__name__}): its values would see "
            "tokens that are not written yet; name a causal language model or a reward model made from one"
        )
