"""The reward: 1 for the exact answer of the prompt's row, else 0."""

from collections.abc import Sequence


def exact(prompts: Sequence[str], responses: Sequence[str], answer: Sequence[str]) -> list[float]:
    """`answer` is the column of that name: `prompts.fields` in ppo.yaml lets it travel with the prompts."""
    return [float(response.strip() == right) for response, right in zip(responses, answer, strict=True)]
