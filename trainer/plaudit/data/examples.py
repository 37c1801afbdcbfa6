"""Examples for supervised fine-tuning as token rows with labels, and the split into training and held-out examples.

Failure modes: a loss on the prompt; a completion whose end token has no loss; a text that one stage trains on and
another evaluates on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plaudit.data.rendering import (
    ASSISTANT,
    Conversation,
    assistant_spans,
    conversation,
    is_conversation,
    marked_by_template,
    render,
    tokens_within,
)
from plaudit.data.sources import Split, is_held_out, load_texts, shuffled_place
from plaudit.data.tables import DataError, Table, load_table
from plaudit.errors import ConfigError
from plaudit.policy.texts import tokens_in_front
from plaudit.settings.sft import SFTConfig

IGNORED = -100
"""The label of a token that the loss leaves out."""

Format = Literal["text", "messages", "prompt-completion"]


@dataclass(frozen=True)
class Example:
    """One text, a prompt with its completion, or a conversation."""

    text: str = ""
    """A text, which the loss covers in full; or a completion."""
    prompt: str | None = None
    """The prompt of a completion, masked from the loss."""
    turns: tuple[tuple[str, str], ...] = ()
    """A conversation as (role, content)."""
    first: int = 0
    """Turns before this index are masked from the loss, including the assistant's."""

    @property
    def is_conversation(self) -> bool:
        """Whether it needs a chat template."""
        return bool(self.turns)

    @property
    def conversation(self) -> Conversation:
        """The turns in the form that chat templates take."""
        return [{"role": role, "content": content} for role, content in self.turns]

    def texts(self) -> list[str]:
        """All texts in the example."""
        if self.turns:
            return [content for _, content in self.turns]
        return [self.text if self.prompt is None else self.prompt + self.text]

    def _answered(self) -> int:
        """The index of the first turn in the loss."""
        return next(i for i, (role, _) in enumerate(self.turns) if role == ASSISTANT and i >= self.first)

    def source(self) -> str:
        """The key for the split: the text, or everything before the assistant's first turn in the loss."""
        if not self.turns:
            return self.text if self.prompt is None else self.prompt
        answered = self._answered()
        return json.dumps([list(turn) for turn in self.turns[:answered]], ensure_ascii=False)

    def prompt_ids(self, tokenizer: Any) -> list[int] | None:
        """The tokens before the first one in the loss; None for a plain text."""
        if self.turns:
            answered = self._answered()
            text = render(tokenizer, self.conversation[:answered], prompt=True) if answered else ""
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        if self.prompt is None:
            return None
        return [*tokens_in_front(tokenizer), *tokenizer(self.prompt, add_special_tokens=False)["input_ids"]]


@dataclass
class Rows:
    """Token rows, and the label of each token: its own id, or `IGNORED`."""

    ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    cut: int = 0
    """Number of examples truncated to `max_length`."""
    without_loss: int = 0
    """Number of examples without any token in the loss after truncation; they have no row."""
    closed: int = 0
    """Number of conversations that got an end-of-text token, because their template ends turns without a token."""
    ends: set[int] = field(default_factory=set)
    """The special tokens that end conversations in the loss."""

    def lines(self, max_length: int) -> list[str]:
        """A summary for people: rows, tokens in the loss, and what was left out."""
        learnt = sum(label != IGNORED for row in self.labels for label in row)
        lines = [f"{len(self.ids)} rows with {sum(map(len, self.ids))} tokens, {learnt} of them learnt"]
        if self.cut:
            lines.append(f"max_length={max_length} cut the end off {self.cut} examples")
        if self.without_loss:
            lines.append(f"left out: {self.without_loss} examples whose prompt alone fills max_length={max_length}")
        if self.closed:
            lines.append(
                f"{self.closed} conversations end with the end-of-text token: their template has none for a turn's end"
            )
        return lines


def load_examples(config: SFTConfig, split: Split) -> tuple[list[Example], str]:
    """The examples of one split, shuffled reproducibly, and a line that names the columns used.

    Raises:
        DataError: the source can't be read, lacks a column, or a row has another format.
    """
    settings = config.dataset
    table = load_table(settings.data)
    form = _format(config, table)
    if form == "text":
        return (
            [Example(text) for text in load_texts(settings, split)],
            f"data={settings.data!r}: texts in column {settings.text_column!r}, all of each is learnt",
        )
    where = f"data={settings.data!r}"
    if form == "messages":
        found = [
            _of_turns(conversation(cell, f"{where}, row {number}, column {config.messages_column!r}"), where, number)
            for number, cell in enumerate(table.columns[config.messages_column], start=1)
        ]
        line = f"{where}: conversations in column {config.messages_column!r}, the assistant's turns are learnt"
    else:
        cells = zip(table.columns[config.prompt_column], table.columns[config.completion_column], strict=True)
        found = [_of_both(*pair, f"{where}, row {number}", number) for number, pair in enumerate(cells, start=1)]
        line = (
            f"{where}: prompts in column {config.prompt_column!r} and completions in {config.completion_column!r}, "
            "the completions are learnt"
        )
    others = [name for name in (settings.text_column, config.messages_column) if name in table.columns]
    ignored = [name for name in others if not (form == "messages" and name == config.messages_column)]
    if ignored:
        line += f"; column {', '.join(map(repr, ignored))} is not read (--data-format chooses)"
    wanted = split == "held_out"
    chosen = [e for e in found if is_held_out(e.source(), settings.held_out_fraction) is wanted]
    chosen.sort(key=lambda example: shuffled_place(example.source()))
    if not chosen:
        raise DataError(
            f"{where} has {len(found)} examples and none of them falls into the {split} split "
            f"(held_out_fraction={settings.held_out_fraction}); use more of them or another fraction"
        )
    return (chosen[: settings.max_texts] if split == "train" else chosen), line


def rows_of(tokenizer: Any, examples: Sequence[Example], max_length: int) -> Rows:
    """Token rows of at most `max_length`, with labels. Texts are split into rows; other examples are truncated.

    Raises:
        ConfigError: the tokenizer can't map tokens to characters.
    """
    if not getattr(tokenizer, "is_fast", False) and any(e.turns or e.prompt is not None for e in examples):
        raise ConfigError(
            f"a {type(tokenizer).__name__} doesn't say which characters its tokens stand for, so prompts can't be told "
            "from completions: save its fast version (tokenizer.json) with the model"
        )
    rows = Rows()
    texts = [example.text for example in examples if not example.turns and example.prompt is None]
    rows.ids = token_rows(tokenizer, texts, max_length) if texts else []
    rows.labels = [list(row) for row in rows.ids]
    for example in examples:
        if example.turns:
            ids, labels = _of_conversation(tokenizer, example, rows)
        elif example.prompt is not None:
            ids, labels = _of_completion(tokenizer, example.prompt, example.text)
        else:
            continue
        rows.cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORED for label in labels[1:]):
            rows.ids.append(ids)
            rows.labels.append(labels)
        else:
            rows.without_loss += 1
    return rows


def _of_conversation(tokenizer: Any, example: Example, rows: Rows) -> tuple[list[int], list[int]]:
    turns = example.conversation
    marked = marked_by_template(tokenizer, turns) if example.first == 0 else None
    if marked is not None:
        ids, learnt = marked
    else:
        text, spans = assistant_spans(tokenizer, turns, first=example.first)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, learnt = encoded["input_ids"], tokens_within(encoded["offset_mapping"], spans)
    last = max((i for i, flag in enumerate(learnt) if flag), default=None)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    if last is not None and ids[last] not in special and tokenizer.eos_token_id is not None:
        # Otherwise the model would not learn where to stop.
        ids, learnt = [*ids[: last + 1], tokenizer.eos_token_id], [*learnt[: last + 1], True]
        rows.closed += 1
    elif last is not None:
        rows.ends.add(ids[last])
    return ids, [token if flag else IGNORED for token, flag in zip(ids, learnt, strict=True)]


def _of_completion(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Prompt and completion tokenised as one text. A token that spans both is masked from the loss."""
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = tokens_within(encoded["offset_mapping"], [(len(prompt), len(prompt) + len(completion))])
    in_front = tokens_in_front(tokenizer)
    ids = [*in_front, *encoded["input_ids"], tokenizer.eos_token_id]
    flags = [False] * len(in_front) + learnt + [True]
    return ids, [token if flag else IGNORED for token, flag in zip(ids, flags, strict=True)]


def token_rows(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Each text with an end-of-text token, split into rows of at most `max_length` from its beginning.

    A text begins with the tokenizer's begin-of-text token, if there is one. Rows never join two texts, so openings
    appear at the start of a row.
    """
    rows: list[list[int]] = []
    in_front = tokens_in_front(tokenizer)
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids = [*in_front, *ids, tokenizer.eos_token_id]
        rows.extend(ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return [row for row in rows if len(row) > 1]


def _format(config: SFTConfig, table: Table) -> Format:
    needed: dict[Format, tuple[str, ...]] = {
        "messages": (config.messages_column,),
        "prompt-completion": (config.prompt_column, config.completion_column),
        "text": (config.dataset.text_column,),
    }
    if config.data_format == "auto":
        return next((form for form, names in needed.items() if all(n in table.columns for n in names)), "text")
    missing = [name for name in needed[config.data_format] if name not in table.columns]
    if missing and config.data_format != "text":
        raise DataError(
            f"data={config.dataset.data!r} has no column {missing[0]!r} for data_format={config.data_format}; it has: "
            f"{', '.join(table.columns) or 'none at all'}. Name it with --messages-column, --prompt-column or "
            "--completion-column"
        )
    return config.data_format


def _of_turns(turns: Conversation, where: str, number: int, first: int = 0) -> Example:
    if not any(turn["role"] == ASSISTANT for turn in turns[first:]):
        raise DataError(
            f"{where}, row {number}: no turn of the {ASSISTANT} to learn among {[turn['role'] for turn in turns]}"
        )
    return Example(turns=tuple((turn["role"], turn["content"]) for turn in turns), first=first)


def _of_both(prompt: Any, completion: Any, where: str, number: int) -> Example:
    if is_conversation(prompt) and is_conversation(completion):
        before = conversation(prompt, f"{where}, prompt")
        return _of_turns([*before, *conversation(completion, f"{where}, completion")], where, number, len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise DataError(
            f"{where}: prompt={prompt!r:.60} and completion={completion!r:.60}; give both as texts, or both as "
            "conversations, and no empty completion"
        )
    return Example(completion, prompt=prompt)
