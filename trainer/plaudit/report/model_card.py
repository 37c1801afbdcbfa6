"""The model card (README.md) of a trained policy: metadata, settings and results."""

import json
from pathlib import Path

import yaml

from plaudit.run.metrics import KL, REWARD_MEAN
from plaudit.run.storage import write_text
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig

VALUE_HEAD = "`value_head.safetensors` is the value head (a linear layer on the last hidden state). "


def write_model_card(config: PPOConfig, directory: Path, metrics: list[dict[str, float]], reward_revision: str) -> None:
    """Write `directory/README.md`, with the hub's metadata in its front matter.

    The trained weights must be in `directory` already; the card refers to them by `config.output_dir`. Raises
    `NotWritten`.
    """
    adapters = directory / "adapter_config.json"
    # For adapters whose training was continued, this is the model that they were created for.
    base = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapters.is_file() else None
    front = {
        "base_model": base or config.policy,
        "library_name": "peft" if base else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ppo", "rlhf", "plaudit"],
    }
    first, last = metrics[0], metrics[-1]
    rows = "\n".join(
        f"| {name} | {first[key]:.3f} | {last[key]:.3f} |"
        for name, key in (("mean reward", REWARD_MEAN), ("KL to the reference (nats)", KL))
    )
    loading = (
        f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{config.output_dir}")"""
        if base
        else f"""from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{config.output_dir}")"""
    )
    write_text(
        directory / "README.md",
        f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {config.policy}, tuned by PPO

Trained for {len(metrics)} PPO steps of {config.ppo.batch_size} samples against the rewards of
`{reward_revision}`{_labels(config)}, prompts from `{config.dataset.data}`.

| | first step | last step |
| --- | --- | --- |
{rows}

```python
{loading}
```

{"" if config.ppo.critic_free else VALUE_HEAD}All settings:

```yaml
{yaml.safe_dump(to_dict(config), sort_keys=False).strip()}
```
""",
    )


def _labels(config: PPOConfig) -> str:
    """` (label POSITIVE)`, where the rewards are logits of labels."""
    labels = dict.fromkeys(c.label for c in config.reward.components if c.url and c.label is not None)
    return f" (label {', '.join(labels)})" if labels else ""
