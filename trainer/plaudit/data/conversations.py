"""Conversations from the rows of a table, checked message by message.

Failure modes: a message reaches the policy in another form than the judge, or not at all. A message therefore has a
role and a text only, because a template might show other fields to the policy that the wire does not carry to the
judge.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError

from plaudit.data.tables import DataError, require_characters
from plaudit.wire import ChatMessage
from plaudit.wire.rewards import MAX_MESSAGES

Conversation: TypeAlias = list[dict[str, str]]
"""Turns with `role` and `content`, as chat templates take them."""
Prompt: TypeAlias = str | Conversation
"""A text, or the turns that the answer continues."""
ASSISTANT = "assistant"
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


def conversation(value: Any, where: str) -> Conversation:
    """As `messages_of`, for stages 1 and 2: roles are the template's affair, and other keys of a turn are not read.

    Raises:
        DataError: it is no list of objects with a `role` and a `content` that are texts.
    """
    turns = plain(value)
    if isinstance(turns, str):
        with contextlib.suppress(ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f'{where}: {turns!r:.60} is no conversation; write it as [{{"role": "user", "content": "…"}}, …]'
        )
    found = []
    for number, turn in enumerate(turns, start=1):
        role, content = (turn.get(key) if isinstance(turn, Mapping) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: turn {number} is {turn!r:.80}; each turn needs a role and a content that are texts"
            )
        found.append({"role": role, "content": content})
    return found


def plain(value: Any) -> Any:
    """Lists and dicts where Parquet gives arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def is_conversation(value: Any) -> bool:
    """Whether a cell holds turns and no text."""
    value = plain(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
