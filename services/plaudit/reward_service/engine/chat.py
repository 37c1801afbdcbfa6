"""Conversations in a judge's own chat template: token for token what `apply_chat_template` of transformers gives.

The template writes all special tokens, so the tokenizer adds none.

Failure modes: the first token is doubled, the template leaves the response out, or truncation removes the question
where an older turn could be removed.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from plaudit.reward_service.engine.batching import CHARS_PER_TOKEN_LIMIT, Chat, Encoded, Text, Turn
from plaudit.reward_service.engine.model_files import ModelError

MAX_RENDER_S = 5.0
"""How long the template may work on one conversation. Hundreds of turns take some milliseconds."""
LINES_BETWEEN_LOOKS = 500
"""Lines of the template's code between two looks at the clock."""
RENDERED_PER_CHAR = 4
RENDERED_BESIDE = 64 * 1024
"""Characters that a template may make: so many for each of the conversation, and so many beside."""
SYSTEM_ROLES = frozenset({"system", "developer"})
TEMPLATE_FILE = "<template>"
"""What jinja calls the file of a compiled template."""
MAX_REFUSAL_CHARS = 300

Tokenize = Callable[[Sequence[tuple[str, None]]], list[Encoded]]
"""Token ids of rendered texts without further special tokens, cut to the model's length and marked where they were."""


class TemplateRefused(Exception):
    """The template raised, or made too much, or took too long."""


@dataclass(frozen=True)
class _Attempt:
    """A conversation as far as it is tried."""

    turns: tuple[Turn, ...]
    shortened: bool
    rendered: str | None
    refused: str | None = None


class ChatTemplate:
    """A tokenizer's chat template. Raises `ModelError` where there is none, or it can't write a plain conversation."""

    def __init__(self, tokenizer: Any, name: str, *, max_tokens: int, truncation_side: str) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._max_chars = max_tokens * CHARS_PER_TOKEN_LIMIT
        self._side = truncation_side
        if not tokenizer.chat_template:
            raise ModelError(
                f"{name} has no chat template for --join chat; name a file that holds one with --chat-template FILE"
            )
        try:
            rendered = self.render((("user", "good"), ("assistant", "story")))
        except TemplateRefused as error:
            raise ModelError(
                f"{name} has a chat template that fails on a plain conversation of user and assistant: {error}; give "
                "another one with --chat-template FILE"
            ) from error
        if "good" not in rendered or "story" not in rendered:
            raise ModelError(
                f"{name} has a chat template that leaves out what user or assistant said; give another one with "
                "--chat-template FILE"
            )

    def require_room(self, tokenize: Tokenize, name: str) -> None:
        """Raise `ModelError` where the template alone is as long as the model takes."""
        [empty] = tokenize([(self.render((("user", ""), ("assistant", ""))), None)])
        if empty.truncated or len(empty.ids) >= self._max_tokens:
            raise ModelError(
                f"--max-tokens {self._max_tokens} leaves no room for text beside what the chat template of {name} adds"
            )

    def render(self, turns: Sequence[Turn]) -> str:
        """The conversation as one text. Raises `TemplateRefused`."""
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            with _time_limit(MAX_RENDER_S):
                rendered: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever the template's own code does
            said = " ".join(str(error).split()) or type(error).__name__
            raise TemplateRefused(said[:MAX_REFUSAL_CHARS]) from error
        most = RENDERED_PER_CHAR * sum(len(content) for _, content in turns) + RENDERED_BESIDE
        if len(rendered) > most:
            raise TemplateRefused(f"it made {len(rendered)} characters of a conversation, and {most} are the bound")
        return rendered

    def encode(self, texts: Sequence[Text], tokenize: Tokenize) -> list[Encoded]:
        """Each conversation's tokens. One that is too long loses its oldest turns first, those of the system excepted.

        A text that is no conversation is taken for one that its sender has rendered; a pair is a user's turn and the
        answer.
        """
        attempts = [self._whole(text) for text in texts]
        rendered = [(attempt.rendered, None) for attempt in attempts if attempt.rendered is not None]
        encodings = iter(tokenize(rendered))
        return [
            _refused(attempt) if attempt.rendered is None else self._fitted(attempt, next(encodings), tokenize)
            for attempt in attempts
        ]

    def _whole(self, text: Text) -> _Attempt:
        if isinstance(text, Chat):
            turns = text.turns
        else:
            first, second = text
            if second is None:
                return _Attempt((), False, first)
            turns = (("user", first), ("assistant", second))
        kept = tuple((role, self._cut(content)) for role, content in turns)
        shortened = kept != turns
        # What can't fit by far is not even rendered: a template takes its time over a megabyte.
        starts = _starts(kept)
        while len(starts) > 1 and _chars(kept, starts[0]) > self._max_chars:
            starts.pop(0)
            shortened = True
        return self._attempt(_from(kept, starts[0]), shortened)

    def _attempt(self, turns: tuple[Turn, ...], shortened: bool) -> _Attempt:
        try:
            return _Attempt(turns, shortened, self.render(turns))
        except TemplateRefused as error:
            return _Attempt(turns, shortened, None, str(error))

    def _fitted(self, attempt: _Attempt, encoded: Encoded, tokenize: Tokenize) -> Encoded:
        if not encoded.truncated:
            return Encoded(encoded.ids, encoded.type_ids, attempt.shortened)
        # The fewest turns to drop, by bisection; where it is too long without all of them, its tokens are cut.
        starts = _starts(attempt.turns)[1:]
        longest, fitting = encoded, None
        while starts:
            middle = len(starts) // 2
            tried = self._attempt(_from(attempt.turns, starts[middle]), True)
            [found] = [_refused(tried)] if tried.rendered is None else tokenize([(tried.rendered, None)])
            if found.truncated or found.refused is not None:
                longest, starts = found, starts[middle + 1 :]
            else:
                fitting, starts = found, starts[:middle]
        best = fitting or longest
        return Encoded(best.ids, best.type_ids, True, best.refused)

    def _cut(self, content: str) -> str:
        if len(content) <= self._max_chars:
            return content
        return content[: self._max_chars] if self._side == "right" else content[-self._max_chars :]


def _head(turns: Sequence[Turn]) -> int:
    """How many turns of the system the conversation begins with. The last turn, which is judged, is none of them."""
    head = 0
    while head < len(turns) - 1 and turns[head][0] in SYSTEM_ROLES:
        head += 1
    return head


def _starts(turns: Sequence[Turn]) -> list[int]:
    """Where the conversation may begin behind the system's turns: with the role that it begins with, so that turns
    go on alternating, and with a turn before the last one, where there is one."""
    head = _head(turns)
    later = [at for at in range(head + 1, len(turns) - 1) if turns[at][0] == turns[head][0]]
    return [head, *later]


def _from(turns: tuple[Turn, ...], start: int) -> tuple[Turn, ...]:
    return turns[: _head(turns)] + turns[start:]


def _chars(turns: Sequence[Turn], start: int) -> int:
    return sum(len(content) for at, (_, content) in enumerate(turns) if at < _head(turns) or at >= start)


def _refused(attempt: _Attempt) -> Encoded:
    fewer = " (without its oldest turns, for which there is no room)" if attempt.shortened else ""
    return Encoded(
        (), None, attempt.shortened, f"the chat template refuses this conversation{fewer}: {attempt.refused}"
    )


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in a template that takes longer: its loops are Python, and may go on for ever."""
    end = time.monotonic() + seconds
    left = LINES_BETWEEN_LOOKS

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= 1
        if not left:
            left = LINES_BETWEEN_LOOKS
            if time.monotonic() > end:
                raise TimeoutError(f"it took more than {seconds:g} s")
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
