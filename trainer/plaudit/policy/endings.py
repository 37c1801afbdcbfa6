"""Where a response ends by itself: with an end token, or where its text has a stop string.

What would be wrong here: a stop string that is missed because its characters are spread over tokens, found in one way
of sampling and not in another, or shown to the judge. A response's tokens go up to and including the token that
completes a stop string; the judge reads the text in front of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from plaudit.policy.samples import Samples
from plaudit.policy.texts import behind, decode, end_tokens, response_texts
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.policy import GenerationSettings

CONTEXT_TOKENS = 4
"""Tokens decoded in front of those that are looked at: some decoders take away a space at the beginning."""


class StopStrings:
    """Finds stop strings in responses as they grow; none of them costs nothing."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # At worst every byte of a string is a token.
        self._window = max((len(text.encode()) for text in stop), default=0)

    def __bool__(self) -> bool:
        return bool(self._stop)

    def complete(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
        """Whether the last token of each response, given behind its query, is where a stop string is complete."""
        return [self.position(text) is not None for text in self._ends_of(rows, self._window)]

    def first(self, query: Sequence[int], response: Sequence[int], start: int = 0) -> int | None:
        """How many tokens the response has when the first stop string is complete; None if there is none.

        The first `start` tokens are known to complete none.
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
        """Where the first stop string of a text begins."""
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
    """What ends the responses of one model."""

    tokenizer: Tokenizer
    tokens: Sequence[int]
    """Each of them ends a response."""
    stop: StopStrings

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Tokenizer, settings: GenerationSettings) -> "Endings":
        """The end tokens of model and tokenizer, and the stop strings of the settings."""
        return cls(tokenizer, end_tokens(model, tokenizer), StopStrings(tokenizer, settings.stop))

    def ended(self, samples: Samples) -> list[bool]:
        """Which responses ended by themselves, and not because they had all the tokens that they may have."""
        by_token = [row[-1] in self.tokens for row in _responses(samples)]
        return [token or stop for token, stop in zip(by_token, self._stopped(samples), strict=True)]

    def texts(self, samples: Samples) -> list[str]:
        """The responses as a judge reads them: without special tokens, end tokens and what follows a stop string."""
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
