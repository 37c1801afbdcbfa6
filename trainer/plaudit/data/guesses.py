"""What the columns of a table are for, guessed from their names and values. Used by `plaudit init`, which says it all.

Failure mode: an identifier taken for a label, or a label for a text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plaudit.data.conversations import ASSISTANT
from plaudit.data.tables import Table

LOOKED_AT = 1000
"""Rows that are looked at."""
MOST_LABELS = 20
"""A column with more different values than this is no label."""
TEXT_NAMES = ("text", "review", "content", "body", "sentence", "comment", "document", "tweet", "message", "summary")
LABEL_NAMES = ("label", "labels", "stars", "rating", "score", "sentiment", "class", "target", "category", "points")
MESSAGES_NAMES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "problem")
COMPLETION_NAMES = ("completion", "response", "answer", "output", "reply", "target", "solution")


@dataclass(frozen=True)
class Columns:
    """The guessed columns; None for what the table doesn't have."""

    text: str | None = None
    label: str | None = None
    messages: str | None = None
    ends_with_answer: bool = False
    """Whether most conversations end with the assistant's turn."""
    prompt: str | None = None
    completion: str | None = None
    ranked: bool = False
    """Whether there are chosen and rejected answers."""

    def lines(self, table: Table) -> list[str]:
        """What was guessed, for people, with an example of each column."""
        found = [("text", self.text), ("label", self.label), ("conversations", self.messages)]
        found += [("prompt", self.prompt), ("answer", self.completion)]
        if self.ranked:
            found += [("better answer", "chosen"), ("worse answer", "rejected")]
        lines = [f"{what}: column {name!r}, for example {_example(table, name)}" for what, name in found if name]
        named = {name for _, name in found if name}
        others = [name for name in table.columns if name not in named]
        return lines + ([f"not used: {', '.join(others)}"] if others else [])


def guess(table: Table) -> Columns:
    """Guess by the names first, and by the values where no name fits."""
    names = {name.casefold(): name for name in table.columns}
    conversations = [name for name in table.columns if _all(table, name, _is_conversation)]
    ranked = {"chosen", "rejected"} <= table.columns.keys()
    if ranked:
        prompt = _named(names, PROMPT_NAMES)
        return Columns(prompt=prompt if prompt and _all(table, prompt, _is_text) else None, ranked=True)
    if conversations:
        chosen = next((name for name in conversations if name.casefold() in MESSAGES_NAMES), conversations[0])
        ends = [_turns(value)[-1].get("role") == ASSISTANT for value in _values(table, chosen)]
        return Columns(messages=chosen, ends_with_answer=sum(ends) * 2 > len(ends))
    texts = [name for name in table.columns if _all(table, name, _is_text)]
    text_names = {name.casefold(): name for name in texts}
    prompt, completion = _named(text_names, PROMPT_NAMES), _named(text_names, COMPLETION_NAMES)
    if prompt is not None and completion is not None:
        return Columns(prompt=prompt, completion=completion)
    label = _named({name.casefold(): name for name in table.columns if _could_be_label(table, name)}, LABEL_NAMES)
    long = [name for name in texts if name != label and not _could_be_label(table, name)] or texts
    text = _named({name.casefold(): name for name in long}, TEXT_NAMES) or max(
        long, key=lambda name: _mean_length(table, name), default=None
    )
    if label is None:
        others = [name for name in table.columns if name != text and _could_be_label(table, name)]
        label = others[0] if len(others) == 1 else None
    if prompt is not None and text == prompt and label is None:
        return Columns(prompt=prompt)
    return Columns(text=text, label=label)


def _named(there: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    return next((there[name] for name in wanted if name in there), None)


def _values(table: Table, name: str) -> list[Any]:
    return [value for value in table.columns[name][:LOOKED_AT] if value not in (None, "")]


def _all(table: Table, name: str, holds: Any) -> bool:
    values = _values(table, name)
    return bool(values) and all(map(holds, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _turns(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _is_conversation(value: Any) -> bool:
    turns = _turns(value)
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and "role" in t for t in turns)


def _could_be_label(table: Table, name: str) -> bool:
    values = _values(table, name)
    if not all(isinstance(value, str | int | float) for value in values):
        return False
    different = {str(value) for value in values}
    return 2 <= len(different) <= min(MOST_LABELS, len(values) // 2) and max(map(len, different)) <= 40


def _mean_length(table: Table, name: str) -> float:
    values = _values(table, name)
    return sum(map(len, values)) / len(values)


def _example(table: Table, name: str) -> str:
    value = next(iter(_values(table, name)), None)
    return f"{str(value)!r:.60}"
