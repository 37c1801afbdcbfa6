"""The model card (README.md) of a reward model: settings, accuracy, and the scale of its scores."""

from collections.abc import Mapping

from plaudit.report.cards import stage_card
from plaudit.report.preferences import RankingFigures
from plaudit.settings.reward_model import RewardModelConfig


def reward_model_card(config: RewardModelConfig, figures: RankingFigures, scale: float, prompts: int) -> str:
    """The card of a model trained on ranked answers. `scale` is the factor applied to its scores."""
    return _card(
        config,
        "A reward model from ranked answers",
        f"""It gives one score to a prompt and an answer in one text; the higher, the better. Trained on {prompts}
prompts with all pairs of their answers (Bradley-Terry).

On {figures.prompts} held-out prompts it: {figures.line()}.

The head's weights hold a factor of {scale:.6g} (`score_scale` in config.json): divide scores by it before you read the
difference of two as log-odds.""",
    )


def classifier_card(config: RewardModelConfig, held_out: Mapping[str, str]) -> str:
    """The card of a model trained on labels. `held_out` says how well it does on each kind of held-out texts."""
    figures = "\n".join(f"- {name}: {line}" for name, line in held_out.items())
    return _card(
        config,
        "A reward model from labelled texts",
        f"""It gives a logit to each of the labels {", ".join(config.label_names)}. PPO's reward is the logit of one of
them.

On held-out texts:

{figures}""",
    )


def _card(config: RewardModelConfig, title: str, text: str) -> str:
    served = f"""{text}

```bash
plaudit-reward --model {config.output_dir}
plaudit ppo --reward.url http://127.0.0.1:8000
```"""
    return stage_card(
        config,
        title,
        served,
        base=None if config.from_scratch else config.model,
        library="transformers",
        pipeline="text-classification",
        tags=("reward-model", "rlhf"),
    )
