"""The end of a response: an end token, or a stop string in its text.

A response's tokens include the token that completes a stop string; the reward sees only the text before the stop
string. Failure modes: a stop string that spans several tokens is missed; the sampling methods disagree; a stop string
is shown to the reward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from plaudit.policy.samples import Samples
from plaudit.policy.texts import behind, decode, end_tokens, response_texts
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.policy import GenerationSettings

CONTEXT_TOKENS = 4
"""Tokens of context decoded before the ones to search, because some decoders drop a leading space."""


class StopStrings:
    """Finds stop strings in growing responses. Without stop strings it does no work."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # In the worst case, every byte of a string is a token.
        self._window = max((len(text.encode()) for text in stop), default=0)

    def __bool__(self) -> bool:
        return bool(self._stop)

    def complete(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
        """Whether the last token of each response completes a stop string. `rows` are pairs of query and response."""
        return [self.position(text) is not None for text in self._ends_of(rows, self._window)]

    def first(self, query: Sequence[int], response: Sequence[int], start: int = 0) -> int | None:
        """The number of response tokens at which the first stop string is complete; None if there is none.

        The first `start` tokens are known not to complete one.
        """
        if not self._stop or start >= len(response):
            return None
        (text,) = self._ends_of([(query, response)], len(response) - start + self._window)
        if self.position(text) is None:
            return None
        lengths = range(start + 1, len(response) + 1)
        complete = self.complete([(query, response[:length]) for length in lengths])
        return next((length for length, ends in zip(lengths, complete, strict=True) if ends), None)

    def position(self, text: str) -> int | None:
        """The index at which the first stop string in a text begins."""
        return min((place for place in map(text.find, self._stop) if place >= 0), default=None)

    def _ends_of(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: int) -> Iterator[str]:
        """The text of the last `tokens` tokens of each response."""
        fronts, wholes = [], []
        for query, response in rows:
            behind_query = max(0, len(response) - tokens)
            front = [*query[-CONTEXT_TOKENS:], *response[:behind_query]][-CONTEXT_TOKENS:]
            fronts.append(front)
            wholes.append([*front, *response[behind_query:]])
        return map(behind, decode(self._tokenizer, fronts), decode(self._tokenizer, wholes))


@dataclass(frozen=True)
class Endings:
    """The end tokens and stop strings of one model."""

    tokenizer: Tokenizer
    tokens: Sequence[int]
    """Each of them ends a response."""
    stop: StopStrings

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Tokenizer, settings: GenerationSettings) -> "Endings":
        """The end tokens of model and tokenizer, and the stop strings of the settings."""
        return cls(tokenizer, end_tokens(model, tokenizer), StopStrings(tokenizer, settings.stop))

    def ended(self, samples: Samples) -> list[bool]:
        """Which responses ended with an end token or a stop string, not at the length limit."""
        by_token = [row[-1] in self.tokens for row in _responses(samples)]
        return [token or stop for token, stop in zip(by_token, self._stopped(samples), strict=True)]

    def texts(self, samples: Samples) -> list[str]:
        """The responses as the reward sees them: without special tokens, end tokens, and text from a stop string on."""
        texts = response_texts(self.tokenizer, samples, self.tokens)
        places = [
            self.stop.position(text) if stopped else None
            for text, stopped in zip(texts, self._stopped(samples), strict=True)
        ]
        return [text[:place] for text, place in zip(texts, places, strict=True)]

    def _stopped(self, samples: Samples) -> list[bool]:
        if not self.stop:
            return [False] * len(samples)
        return self.stop.complete(list(zip(_queries(samples), _responses(samples), strict=True)))


def _queries(samples: Samples) -> list[list[int]]:
    rows = zip(samples.query_ids.tolist(), samples.lengths[0].tolist(), strict=True)
    return [row[len(row) - length :] for row, length in rows]


def _responses(samples: Samples) -> list[list[int]]:
    return [
        row[:length] for row, length in zip(samples.response_ids.tolist(), samples.lengths[1].tolist(), strict=True)
    ]
