"""Prompts: tokens for the policy, texts or messages for the reward, and the columns that belong to them.

Failure modes: a prompt with another row's fields; a prompt that the reward sees differently from the policy; a prompt
that is cut or left out without a message.
"""

import functools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from plaudit.data.chat_templates import render, use_chat_template
from plaudit.data.conversations import as_text, key_of, messages_of, with_system
from plaudit.data.sources import (
    Rows,
    Split,
    fingerprint,
    require_column,
    rows_of_split,
    say_once,
    text_rows,
)
from plaudit.data.tables import DataError, Table, kind_of, require_characters
from plaudit.errors import ConfigError
from plaudit.policy.texts import cut_between_characters, prompt_texts, tokens_in_front
from plaudit.policy.tokenizer import Tokenizer
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.wire import ChatMessage

BLOCK_ROWS = 4096
"""Rows tokenised at once, if not all may be needed."""


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their source's split. All lists have one entry per prompt."""

    token_ids: list[list[int]]
    """Token ids for the policy."""
    texts: list[str]
    """Texts for people: the prompt, or a conversation with its roles."""
    messages: list[list[ChatMessage]] | None = None
    """The messages, if the prompts are conversations."""
    fields: dict[str, list[Any]] = field(default_factory=dict)
    """The columns in `prompts.fields`, by name."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def judged(self) -> "list[str | list[ChatMessage]]":
        """The prompts as the reward sees them: texts or conversations."""
        return list(self.texts) if self.messages is None else list(self.messages)

    def rows(self, start: int, stop: int) -> "Prompts":
        """The prompts from `start` to `stop`."""
        return self.select(range(start, min(stop, len(self))))

    def select(self, indices: Sequence[int]) -> "Prompts":
        """These prompts, in this order."""
        return Prompts(
            [self.token_ids[i] for i in indices],
            [self.texts[i] for i in indices],
            None if self.messages is None else [self.messages[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.fields.items()},
        )

    def fingerprint(self) -> str:
        """A hash of everything that policy and reward receive, for checkpoints. It covers prompts, order and fields."""
        if self.messages is None and not self.fields:
            return fingerprint(zip(self.token_ids, self.texts, strict=True))
        conversations = self.texts if self.messages is None else map(key_of, self.messages)
        fields = ({name: values[i] for name, values in sorted(self.fields.items())} for i in range(len(self)))
        return fingerprint(zip(self.token_ids, conversations, fields, strict=True))


class PromptSchedule:
    """The prompts of each step: a new permutation every epoch, which depends only on seed and epoch.

    With `responses_per_prompt`, each prompt is there as many times, one after another; `batch_size` counts them all.
    """

    def __init__(self, prompts: Prompts, batch_size: int, *, seed: int, responses_per_prompt: int = 1) -> None:
        """`responses_per_prompt` divides `batch_size`.

        Raises `ConfigError` for fewer prompts than a batch has.
        """
        batch_size //= responses_per_prompt
        self.steps_per_epoch = len(prompts) // batch_size
        if self.steps_per_epoch == 0:
            each = f" of {responses_per_prompt} responses each" if responses_per_prompt > 1 else ""
            batch = f"ppo.batch_size={batch_size * responses_per_prompt}"
            raise ConfigError(f"{len(prompts)} prompts{each} are fewer than one batch of {batch}")
        self._responses_per_prompt = responses_per_prompt
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, torch.Tensor] | None = None

    def batch(self, step: int) -> Prompts:
        """The prompts of step `step`, counted from 0, as many as responses."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._prompts), generator=generator)
        start = position * self._batch_size
        chosen = self._order[1][start : start + self._batch_size]
        return self._prompts.select(chosen.repeat_interleave(self._responses_per_prompt).tolist())


def load_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
    room: int | None = None,
) -> Prompts:
    """The prompts of one split: openings of texts, a column of prompts, or a column of conversations.

    An opening is the first tokens of a text that is long enough; `seed` determines their number. Texts begin with the
    tokenizer's begin-of-text token, if it has one; conversations are rendered by the chat template alone. An opening
    never ends inside a character: it is shortened, or extended by the tokens that the character needs. A column's
    prompts of more than `prompts.max_tokens` or `room` tokens are left out, with a message.

    Raises:
        DataError: the source can't be read, contains something other than prompts, or no row is left.
        ChatTemplateError: conversations can't be rendered.
    """
    return load_sourced_prompts(settings, prompts, tokenizer, split, seed=seed, limit=limit, room=room)[0]


def load_sourced_prompts(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    limit: int | None = None,
    room: int | None = None,
) -> tuple[Prompts, list[str]]:
    """`load_prompts`, and each prompt's key for the split: the text of an opening, or the whole prompt.

    Raises:
        DataError: as `load_prompts` does.
        ChatTemplateError: as `load_prompts` does.
    """
    if prompts.kind == "openings":
        return _openings(settings, prompts, tokenizer, split, seed=seed, limit=limit)
    if prompts.kind == "text":
        assert prompts.column is not None
        keys_of = functools.partial(text_rows, settings=settings, name=prompts.column, flag="--prompts.column")
    else:
        policy = f"policy={tokenizer.name_or_path!r}"
        use_chat_template(tokenizer, prompts.chat_template, policy, "prompts.chat_template")
        keys_of = functools.partial(_conversation_rows, settings=settings, prompts=prompts)
    rows = rows_of_split(settings, split, keys_of)
    bound = min((most for most in (prompts.max_tokens, room) if most is not None), default=math.inf)
    left_out = _LeftOut(settings, prompts, room)
    kept: list[int] = []
    token_ids: list[list[int]] = []
    messages: list[list[ChatMessage]] = []
    for block in _blocks(rows, limit):
        conversations = None if prompts.kind == "text" else _conversations(block, settings, prompts)
        for i, ids in enumerate(_tokens(tokenizer, block, conversations, settings)):
            if 0 < len(ids) <= bound:
                kept.append(block.indices[i])
                token_ids.append(ids)
                messages += [] if conversations is None else [conversations[i]]
            else:
                left_out.add(block.indices[i], len(ids), block.keys[i])
        if limit is not None and len(kept) >= limit:
            break
    left_out.say(len(kept), split)
    kept, token_ids = kept[:limit], token_ids[:limit]
    place = {index: i for i, index in enumerate(rows.indices)}
    keys = [rows.keys[place[i]] for i in kept]
    fields = _fields(rows.table, settings, prompts, kept)
    if prompts.kind == "text":
        return Prompts(token_ids, list(keys), None, fields), keys
    return Prompts(token_ids, [as_text(m) for m in messages[:limit]], messages[:limit], fields), keys


def _openings(
    settings: DataSettings,
    prompts: PromptSettings,
    tokenizer: Tokenizer,
    split: Split,
    *,
    seed: int,
    limit: int | None,
) -> tuple[Prompts, list[str]]:
    found = rows_of_split(settings, split, lambda table: text_rows(table, settings, settings.text_column))
    shortest = prompts.shortest_text(settings.data)
    long = [i for i, text in enumerate(found.keys) if len(text) > shortest]
    if len(long) < len(found.keys):
        say_once(
            f"data={settings.data!r}, {split} split: left out {len(found.keys) - len(long)} of {len(found.keys)} texts "
            f"of at most {shortest} characters (prompts.min_text_chars)"
        )
    long = long[:limit]
    if not long:
        raise DataError(
            f"no text in data={settings.data!r} is longer than min_text_chars={shortest} characters; "
            "lower prompts.min_text_chars or name another source"
        )
    texts, rows = [found.keys[i] for i in long], [found.indices[i] for i in long]
    draw = random.Random(seed)
    # An opening needs only the beginning of a text: English has about 4 characters per token.
    beginnings = [text[: 16 * prompts.opening_tokens] for text in texts]
    openings = tokenizer(beginnings, add_special_tokens=False, verbose=False)["input_ids"]
    lengths = [draw.randint(prompts.min_tokens, prompts.opening_tokens) for _ in openings]
    in_front = tokens_in_front(tokenizer)
    token_ids = [
        [*in_front, *ids]
        for ids in cut_between_characters(tokenizer, openings, texts, lengths, at_least=prompts.min_tokens)
    ]
    fields = _fields(found.table, settings, prompts, rows)
    return Prompts(token_ids, prompt_texts(tokenizer, token_ids), None, fields), texts


def _blocks(rows: Rows, limit: int | None) -> Iterator[Rows]:
    size = len(rows.indices) if limit is None else BLOCK_ROWS
    for start in range(0, len(rows.indices), size):
        yield Rows(rows.table, rows.indices[start : start + size], rows.keys[start : start + size])


def _tokens(
    tokenizer: Tokenizer, rows: Rows, conversations: list[list[ChatMessage]] | None, settings: DataSettings
) -> list[list[int]]:
    """The token ids of each row."""
    if conversations is not None:
        return render(tokenizer, conversations, lambda i: f"data={settings.data!r}, row {rows.indices[i] + 1}")
    in_front = tokens_in_front(tokenizer)
    return [[*in_front, *ids] for ids in tokenizer(rows.keys, add_special_tokens=False, verbose=False)["input_ids"]]


def _conversation_rows(table: Table, *, settings: DataSettings, prompts: PromptSettings) -> dict[int, str]:
    """The split key of each conversation, by row index."""
    name = prompts.messages_column
    assert name is not None
    require_column(table, settings, name, "--prompts.messages-column")
    if prompts.system_column is not None:
        require_column(table, settings, prompts.system_column, "--prompts.system-column")
    return {
        i: key_of(_answerable(value, f"data={settings.data!r}, row {i + 1}, column {name!r}"))
        for i, value in enumerate(table.columns[name])
    }


def _answerable(value: Any, where: str) -> list[ChatMessage]:
    """The messages in a cell. The last one must not be the assistant's."""
    messages = messages_of(value, where)
    if messages[-1].role == "assistant":
        raise DataError(
            f"{where}: the last message is the assistant's own, {messages[-1].content!r:.60}, and a prompt ends where "
            "the assistant is to answer: take that message off the row"
        )
    return messages


def _conversations(rows: Rows, settings: DataSettings, prompts: PromptSettings) -> list[list[ChatMessage]]:
    """The rows' conversations, with system messages added."""
    conversations = []
    column = prompts.messages_column
    assert column is not None
    for i, value in zip(rows.indices, rows.column(column), strict=True):
        where = f"data={settings.data!r}, row {i + 1}"
        messages, system = messages_of(value, where), prompts.system
        if prompts.system_column is not None:
            named = rows.table.columns[prompts.system_column][i]
            if named is not None and not isinstance(named, str):
                raise DataError(
                    f"{where}, column {prompts.system_column!r}: {named!r:.60} is {kind_of(named)} and no system "
                    "message; write it as a string, or leave it empty"
                )
            if named and messages[0].role == "system" and messages[0].content != named:
                raise DataError(
                    f"{where} has two system messages: {messages[0].content!r:.60} in its conversation and "
                    f"{named!r:.60} in column {prompts.system_column!r}; remove one"
                )
            system = named or system
        conversations.append(with_system(messages, system))
    return conversations


class _LeftOut:
    """Prompts that are too long, by reason, with an example of each."""

    def __init__(self, settings: DataSettings, prompts: PromptSettings, room: int | None) -> None:
        self._settings, self._most, self._room = settings, prompts.max_tokens, room
        self._reasons: dict[str, list[str]] = {}

    def add(self, row: int, tokens: int, key: str) -> None:
        if tokens == 0:
            reason = "no token in the prompt"
        elif self._most is not None and tokens > self._most:
            reason = f"prompts of more than prompts.max_tokens={self._most} tokens"
        else:
            reason = f"prompts of more than {self._room} tokens, which leave no room for the response in the model"
        self._reasons.setdefault(reason, []).append(f"row {row + 1} with {tokens}: {key!r:.60}")

    def say(self, kept: int, split: Split) -> None:
        """Print the message. Raises `DataError` if no prompt is left."""
        looked_at = kept + sum(map(len, self._reasons.values()))
        for reason, examples in self._reasons.items():
            say_once(
                f"data={self._settings.data!r}, {split} split: left out {len(examples)} of {looked_at} with {reason}; "
                f"for example {examples[0]}"
            )
        if not kept:
            raise DataError(
                f"data={self._settings.data!r} has no prompt left in its {split} split: {looked_at} with "
                f"{' or '.join(self._reasons)}; give --prompts.max-tokens more, or --generation.max-new-tokens less"
            )


def _fields(table: Table, settings: DataSettings, prompts: PromptSettings, rows: Sequence[int]) -> dict[str, list[Any]]:
    """The columns in `prompts.fields` for these rows."""
    for name in prompts.fields:
        require_column(table, settings, name, "--prompts.fields")
    return {
        name: [
            _json_value(table.columns[name][i], f"data={settings.data!r}, row {i + 1}, column {name!r}") for i in rows
        ]
        for name in prompts.fields
    }


def _json_value(value: Any, where: str) -> Any:
    """The value, with NaN as None. Raises `DataError` for a value that JSON can't represent."""
    if isinstance(value, float) and math.isnan(value):
        return None
    for text in _texts_in(value):
        require_characters(text, where)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {value!r:.60} can't travel with its prompt ({error}); write it as text or a number, or leave "
            "the column out of --prompts.fields"
        ) from None
    return value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.items() if isinstance(value, dict) else enumerate(value):
            for part in item:
                yield from _texts_in(part)
