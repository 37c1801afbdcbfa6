"""Python functions as hidden judges of simulated annotators."""

from collections.abc import Sequence


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """An answer is the better the more of its letters are vowels; a number between 0 and 10."""
    return [10 * sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text)) for text in responses]


def named_value(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The number at the end of an answer."""
    return [float(text.split()[-1]) for text in responses]
