"""The model card (README.md) of a reward model: settings, accuracy, and the scale of its scores."""

import yaml

from plaudit.report.preferences import RankingFigures
from plaudit.settings.plain import to_dict
from plaudit.settings.reward_model import RewardModelConfig


def reward_model_card(config: RewardModelConfig, figures: RankingFigures, scale: float, prompts: int) -> str:
    """The card of a model trained on ranked answers. `scale` is the factor applied to its scores."""
    front = {
        "base_model": None if config.from_scratch else config.model,
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "rlhf", "plaudit"],
    }
    front = {name: value for name, value in front.items() if value is not None}
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# A reward model from ranked answers

It gives one score to a prompt and an answer in one text; the higher, the better. Trained on {prompts} prompts with all
pairs of their answers (Bradley-Terry).

On {figures.prompts} held-out prompts it: {figures.line()}.

The head's weights hold a factor of {scale:.6g} (`score_scale` in config.json): divide scores by it before you read the
difference of two as log-odds.

```bash
plaudit-reward --model {config.output_dir}
plaudit ppo --reward.url http://127.0.0.1:8000 --reward.label LABEL_0
```

```yaml
{yaml.safe_dump(to_dict(config), sort_keys=False).strip()}
```
"""
