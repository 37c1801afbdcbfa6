"""Models and tokenizers as their directories or the hub have them; what is missing or damaged is one line.

Failure modes: weights that transformers made up at random; a tokenizer that is not the model's.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.adapters import base_of, is_adapters, with_adapters
from plaudit.policy.reading import reading, settle
from plaudit.policy.tokenizer import Tokenizer
from plaudit.policy.transformer import compute_quantised_layers_in_one_way
from plaudit.settings.policy import Quantization


class ModelNotFound(ConfigError):
    """No model at this path, and no hub model of this name within reach."""


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    setting: str = "policy",
) -> PreTrainedModel:
    """A bare causal language model. Raises `ModelNotFound` with one line that names the path."""
    require_reachable(path, setting)
    computes_in = _checkpoint_dtype(path) if quantization is not None and dtype == "auto" else dtype
    options = {"dtype": dtype, **quantised(quantization, dtype=computes_in, device=device)}
    with reading(path):
        try:
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                demo_models.resolve(path), output_loading_info=True, **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise not_found(path, "model", error, setting) from error
    require_no_random_weights(model, loaded, path, setting)
    if quantization is None:
        return model.to(device)
    compute_quantised_layers_in_one_way(model)
    return model


def _checkpoint_dtype(path: str | Path) -> torch.dtype:
    """What the configuration says that the weights are; fp32 where it says nothing."""
    with reading(path):
        dtype: torch.dtype | None = transformers.AutoConfig.from_pretrained(demo_models.resolve(path)).dtype
    return dtype or torch.float32


def quantised(
    quantization: Quantization | None,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: torch.device | str = "cpu",
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise all linear layers but the output head and those named in `keep`.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization={quantization} needs the package bitsandbytes: pip install bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(keep) or None,
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def load_whole_causal_lm(
    path: str | Path, *, device: torch.device | str = "cpu", setting: str = "policy"
) -> PreTrainedModel:
    """A bare causal language model in fp32; of a directory of adapters, their base with the adapters folded in."""
    if not is_adapters(path):
        return load_causal_lm(path, device=device, setting=setting)
    with reading(path):
        base = load_causal_lm(base_of(path), device=device, setting=setting)
        # peft freezes the base.
        return with_adapters(base, demo_models.resolve(path)).merge_and_unload().requires_grad_(True)


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


def load_tokenizer(path: str | Path, *, setting: str = "policy") -> Tokenizer:
    """The tokenizer in a model's directory or of a hub id, with a pad token; of adapters without one, their base's.

    Raises:
        ModelNotFound: there is none, or only the empty one that transformers makes up where the files are missing.
        ConfigError: it has neither a pad token nor an end-of-text token.
    """
    require_reachable(path, setting)
    tokenizer: Tokenizer | None = None
    with reading(path):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(demo_models.resolve(path))
        except (OSError, ValueError) as error:
            if not is_adapters(path):
                raise not_found(path, "tokenizer", error, setting) from error
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


def require_reachable(path: str | Path, setting: str) -> None:
    """Raises `ModelNotFound` for a directory that isn't there, before the hub is asked about it and tried again."""
    settle(path)
    path = demo_models.resolve(path)
    parent = Path(path).parent
    is_path = Path(path).is_absolute() or len(Path(path).parts) > 2 or str(path).startswith(".")
    if not Path(path).is_dir() and (is_path or (parent != Path() and parent.is_dir())):
        raise ModelNotFound(f"{setting}={str(path)!r}: no such directory; name one with a model in it, or a hub id")


def not_found(path: str | Path, what: str, error: Exception, setting: str) -> ModelNotFound:
    """The error for a path whose `what` can't be loaded, in one line."""
    where = "directory" if Path(path).is_dir() else "directory here, and no hub id that can be reached,"
    reason = " ".join(str(error).split())
    return ModelNotFound(f"{setting}={str(path)!r} is no {where} with a {what} that loads ({reason:.160})")
