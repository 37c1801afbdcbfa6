"""Conversations from the rows of a table, checked message by message.

What would be wrong here: a message that reaches the policy in another form than the judge, or not at all. A message has
a role and a text, and nothing else that a template might show to the one and the wire would not carry to the other.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from plaudit.data.tables import DataError, require_characters
from plaudit.wire import ChatMessage
from plaudit.wire.rewards import MAX_MESSAGES

EXAMPLE = '[{"role": "user", "content": "..."}]'


def messages_of(value: Any, where: str) -> list[ChatMessage]:
    """The messages in a cell: a list of objects with a role and a content, or its JSON text, as CSV files have it.

    `where` begins the error's message.

    Raises:
        DataError: the cell holds something else; the message says which part of it.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{where}: {value!r:.60} is no JSON text of messages ({error}); write {EXAMPLE}, or name a column of "
                "plain prompts with --prompts.column"
            ) from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {value!r:.60} is no list of messages; write {EXAMPLE}")
    if len(value) > MAX_MESSAGES:
        raise DataError(f"{where}: {len(value)} messages are more than the {MAX_MESSAGES} that a conversation may have")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {value!r:.60} is no object with a role and a content; write {EXAMPLE}")
    # Parquet gives every row all keys that any row has.
    others = sorted(str(key) for key, held in value.items() if key not in ("role", "content") and held is not None)
    if others:
        raise DataError(
            f"{where} has {others[0]}={value[others[0]]!r:.60} beside role and content: tools, names and other parts "
            "of a message can't be rendered and judged here; remove them or the row"
        )
    role, content = value.get("role"), value.get("content")
    for name, held in (("role", role), ("content", content)):
        if not isinstance(held, str):
            raise DataError(f"{where}: its {name} is {held!r:.60} and no text; write it as a string, or remove the row")
        require_characters(held, where)
    try:
        return ChatMessage.model_validate({"role": role, "content": content})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise DataError(
            f"{where}: {problem['loc'][0]}={problem['input']!r:.60}: {str(problem['msg']).lower()}"
        ) from None


def with_system(messages: Sequence[ChatMessage], system: str | None) -> list[ChatMessage]:
    """The messages behind this system message, unless they begin with one of their own or there is none to add."""
    if system is None or messages[0].role == "system":
        return list(messages)
    return [ChatMessage(role="system", content=system), *messages]


def key_of(messages: Sequence[ChatMessage]) -> str:
    """A text that two conversations share only if they are the same: what decides to which split they belong."""
    return json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)


def as_text(messages: Sequence[ChatMessage]) -> str:
    """A conversation as people read it: a lone question as it is, else every message behind its role."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
