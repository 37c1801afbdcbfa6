"""Write a run's policy as plain Hugging Face files: a merged model, or adapters.

Failure mode: files that other programs load as another policy. They are therefore loaded again with transformers and
peft alone, and must give the policy's own log-probabilities before they are put in place.
"""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plaudit import demo_models
from plaudit.data.chat_templates import use_chat_template
from plaudit.errors import ConfigError, NotAsSaved
from plaudit.policy.adapters import base_of
from plaudit.policy.loading import load_policy
from plaudit.policy.merging import merge_policy
from plaudit.policy.model import Policy
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.saving import save_policy
from plaudit.run.storage import replaced_model, write_text
from plaudit.settings.export import ExportConfig
from plaudit.stages.trained_policy import Source, find, load_checkpoint

EXPORT_FILE = "export.json"
PROBES = ("The film was", "1 + 1 = 2, and", "Once upon a time there was a small town by the sea.")
"""Texts whose log-probabilities are compared."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""The largest difference of a token's log-probability, in nats, by the precision that the weights are saved in."""


def run(config: ExportConfig) -> Path:
    """Export, load again, compare. Returns the directory.

    Raises:
        ConfigError: there is no policy, OUT is not empty, or the run has no adapters to export.
        NotAsSaved: the files, loaded again, are another policy. Nothing is left of them.
        NotWritten: the disk is full or can't be written to.
    """
    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise ConfigError(f"{config.output_dir} is not empty: name a new directory")
    source = find(config.source)
    print(f"exporting {source.directory}", flush=True)
    policy = _load(source).eval()
    if config.form == "adapters" and not policy.has_adapters:
        raise ConfigError(f"{config.source!r} has no adapters, since all parameters were trained: leave out --form")
    tokenizer = load_tokenizer(source.settings.policy if source.is_checkpoint else str(source.directory))
    template = source.settings.prompts.chat_template
    if template is not None and template.is_file():
        use_chat_template(tokenizer, template, f"policy={source.settings.policy!r}")
    with replaced_model(config.output_dir) as beside:
        if config.form == "merged":
            merge_policy(policy, beside)
        else:
            save_policy(policy, beside)
        (beside / "value_head.safetensors").unlink(missing_ok=True)
        tokenizer.save_pretrained(beside)
        difference, precision = _compare(policy, tokenizer, beside, config)
        described = {"source": str(source.directory), "policy": source.settings.policy, "form": config.form}
        write_text(beside / EXPORT_FILE, json.dumps(described, indent=2) + "\n")
    print(
        f"{config.output_dir} holds {_what(config, policy)}; loaded again with plain "
        f"{'transformers' if config.form == 'merged' else 'peft'} ({precision}), log-probabilities differ by at most "
        f"{difference:.1e} nats"
    )
    return config.output_dir


def _load(source: Source) -> Policy:
    if source.is_checkpoint:
        return load_checkpoint(source.settings, source.directory, "cpu")
    return load_policy(source.directory, source.settings.lora)


def _what(config: ExportConfig, policy: Policy) -> str:
    if config.form == "merged":
        return "a whole model"
    return f"adapters for {_base_of(policy)}"


def _base_of(policy: Policy) -> str:
    model: Any = policy.model
    return str(model.peft_config["default"].base_model_name_or_path)


def _compare(policy: Policy, tokenizer: Any, directory: Path, config: ExportConfig) -> tuple[float, str]:
    """The largest difference of log-probabilities between the policy and the files, and the files' precision."""
    if config.form == "merged":
        again: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    else:
        base = AutoModelForCausalLM.from_pretrained(demo_models.resolve(base_of(directory)), dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(base, str(directory))
    read = AutoTokenizer.from_pretrained(directory)
    dtype = next(again.parameters()).dtype
    worst = 0.0
    for text in PROBES:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.tolist() != read(text, return_tensors="pt")["input_ids"].tolist():
            raise NotAsSaved(f"{config.output_dir} is not written: its tokenizer, loaded again, gives other tokens")
        expected, got = _logprobs(policy.language_model, ids), _logprobs(again.eval(), ids)
        worst = max(worst, (expected - got).abs().max().item())
    if not worst <= TOLERANCE.get(dtype, 1e-3):
        raise NotAsSaved(
            f"{config.output_dir} is not written: loaded again, it differs from the policy by {worst:.3g} nats"
        )
    return worst, str(dtype).removeprefix("torch.")


@torch.no_grad()
def _logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T - 1] of the tokens after the first, in fp32."""
    every = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return torch.gather(every, 1, ids[0, 1:, None])[:, 0]
