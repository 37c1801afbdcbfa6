"""Rows to score: prompts (texts or conversations), responses, and their columns.

A row keeps its index into the columns through chunking, retries and hedging. Failure modes: a reward computed from
another row's values; a required value that is not sent.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import JsonValue, ValidationError

from plaudit.rewards.errors import RewardRejected
from plaudit.wire import ChatMessage, RewardItem, checked_fields

Message: TypeAlias = Mapping[str, Any] | ChatMessage
Prompt: TypeAlias = str | Sequence[Message]
"""A text, or the messages of a conversation: mappings with `role` and `content`."""
Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Columns by name, with one value per row."""
PLAIN_VALUES = 5
"""Number of JSON values and keys in an item with two texts: the object, two keys, two texts. A message has as many."""


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt, its response, and its index into the columns."""

    item: RewardItem
    """Prompt and response. `with_fields` adds the fields that a reward asks for."""
    columns: Columns
    place: int

    def with_fields(self, needed: Iterable[str], also: Iterable[str], asked_by: str) -> RewardItem:
        """The item with the fields `needed`, and the existing ones of `also`. Raises `RewardRejected`."""
        fields = {name: plain(self.needed(name, asked_by)) for name in needed}
        fields |= {name: plain(self.columns[name][self.place]) for name in also if name in self.columns}
        if not fields:
            return self.item
        try:
            checked: dict[str, JsonValue] = checked_fields(fields)
        except ValueError as error:
            raise RewardRejected(f"the fields of row {self.place} can't be sent to {asked_by}: {error}") from error
        return self.item.model_copy(update={"fields": checked})

    def needed(self, name: str, asked_by: str) -> Any:
        """The value of a required column. Raises `RewardRejected` if it is missing or None."""
        value = self.columns[name][self.place] if name in self.columns else None
        if value is None:
            there_are = f"its columns are {', '.join(self.columns)}" if self.columns else "it has no columns"
            raise RewardRejected(
                f"{asked_by} asks for the field {name!r}, and row {self.place} has no value for it ({there_are}); add "
                "the column to the data, or take the rows without it out"
            )
        return value

    def values(self, names: Iterable[str]) -> int:
        """Number of JSON values and keys that the row adds to a request with these fields."""
        prompt = self.item.prompt
        of_fields = sum(1 + _values(self.columns[name][self.place]) for name in names if name in self.columns)
        return PLAIN_VALUES * (1 if isinstance(prompt, str) else 1 + len(prompt)) + 2 + of_fields


def rows_of(prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns) -> list[Row]:
    """One row per response. Raises `RewardRejected` for a text or message that can't be sent."""
    rows = []
    for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            item = RewardItem(prompt=prompt if isinstance(prompt, str) else messages_of(prompt), response=response)
        except ValidationError as error:
            raise RewardRejected(f"row {place} has a text that can't be sent: {error}") from error
        rows.append(Row(item, columns, place))
    return rows


def check_columns(columns: Columns, count: int) -> None:
    """Raises `ValueError` for a column without exactly one value per row."""
    for name, column in columns.items():
        if isinstance(column, str | bytes) or len(column) != count:
            raise ValueError(f"field {name!r} has {len(column)} values for {count} responses: one a response is needed")


def check_names(needed: Iterable[str], names: Collection[str] | None, asked_by: str) -> None:
    """Raises `RewardRejected` if a required field is not a column. `names` is None if the columns are unknown."""
    missing = [name for name in needed if names is not None and name not in names]
    if missing:
        there_are = f"the data has the columns {', '.join(sorted(names or ()))}" if names else "the data has no columns"
        raise RewardRejected(f"{asked_by} asks for the field {missing[0]!r}, and {there_are}")


def messages_of(messages: Sequence[Message]) -> list[ChatMessage]:
    """The conversation as wire messages. Raises `RewardRejected` for messages with more than a role and a text."""
    return [message if isinstance(message, ChatMessage) else _message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> ChatMessage:
    more = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [], "")]
    if more or not isinstance(message.get("role"), str):
        what = f"with {', '.join(map(str, more))}" if more else "without a role"
        raise RewardRejected(f"a message {what} can't be judged, only role and content: {dict(message)!r:.200}")
    return ChatMessage(role=message["role"], content=text_of(message.get("content")))


def text_of(content: object) -> str:
    """A message's text, which may come in parts: `[{"type": "text", "text": ...}, ...]`. Raises `RewardRejected`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RewardRejected(f"a message's content is {content!r:.80}, and only text can be judged")
    return "".join(map(str, texts))


def plain(value: Any) -> Any:
    """The value converted to JSON types, from tuples, mappings, and numpy-like scalars and arrays."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _values(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + sum(1 + _values(member) for member in value.values())
    if isinstance(value, list | tuple):
        return 1 + sum(map(_values, value))
    return 1
