"""The model card (README.md) of a trained policy: metadata, settings and results."""

import json
from pathlib import Path

from plaudit.report.cards import settings_block
from plaudit.run.hub import front_matter
from plaudit.run.metrics import KL, REWARD_MEAN
from plaudit.run.storage import write_text
from plaudit.settings.ppo import PPOConfig

VALUE_HEAD = "`value_head.safetensors` is the value head (a linear layer on the last hidden state). "


def write_model_card(
    config: PPOConfig, directory: Path, metrics: list[dict[str, float]], reward_revision: str, *, merged: str = ""
) -> None:
    """Write `directory/README.md`, with the hub's metadata in its front matter.

    The trained weights must be in `directory` already; the card refers to them by `config.output_dir`, or its
    sub-directory `merged`. Raises `NotWritten`.
    """
    adapters = directory / "adapter_config.json"
    # For adapters whose training was continued, this is the model that they were created for.
    base = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapters.is_file() else None
    front = front_matter(
        base or config.policy,
        library="peft" if base else "transformers",
        pipeline="text-generation",
        tags=("ppo", "rlhf"),
    )
    name = config.output_dir / merged
    first, last = metrics[0], metrics[-1]
    rows = "\n".join(
        f"| {name} | {first[key]:.3f} | {last[key]:.3f} |"
        for name, key in (("mean reward", REWARD_MEAN), ("KL to the reference (nats)", KL))
    )
    loading = (
        f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")"""
        if base
        else f"""from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")"""
    )
    write_text(
        directory / "README.md",
        f"""{front}

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

{settings_block(config)}
""",
    )


def _labels(config: PPOConfig) -> str:
    """` (label POSITIVE)`, where the rewards are logits of labels."""
    labels = dict.fromkeys(c.label for c in config.reward.components if c.url and c.label is not None)
    return f" (label {', '.join(labels)})" if labels else ""
