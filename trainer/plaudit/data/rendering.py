"""Conversations as a chat template renders them, and which characters of that the assistant wrote.

What would be wrong here: a loss on what the user said, an end-of-turn token that nothing learns to write, or an answer
that is taken for another because the template drops a part of it.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from plaudit.data.tables import DataError
from plaudit.errors import ConfigError

Conversation: TypeAlias = list[dict[str, str]]
"""Turns with `role` and `content`, as chat templates take them."""
Prompt: TypeAlias = str | Conversation
"""A text, or the turns that the answer continues."""

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a template: what follows is written by the assistant."""


def conversation(value: Any, where: str) -> Conversation:
    """A cell of a table as turns of text: a list or, in CSV files, its JSON. `where` names the cell in errors.

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


def use_chat_template(tokenizer: Any, file: str | None, source: str) -> None:
    """Gives the tokenizer the chat template in `file`, to be saved with it; without a file it must have its own.

    Raises:
        ConfigError: the file can't be read, or there is no template.
    """
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template={file!r} can't be read: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model={source!r}: its tokenizer has no chat template, and the data hold conversations; give one as a "
            "Jinja file with --chat-template, or name a model that was made for conversations"
        )


def render(tokenizer: Any, turns: Conversation, *, prompt: bool = False) -> str:
    """The conversation as text; as a `prompt`, up to where the assistant's next turn begins.

    Raises:
        DataError: the template refuses these turns.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"the chat template refuses a conversation of {roles} ({error}): mend or remove it") from error
    return text


def judged_text(tokenizer: Any, prompt: Prompt, answer: str) -> str:
    """What a reward model reads: prompt and answer in one, or the conversation with the answer as its next turn.

    A rendered conversation holds its special tokens already; see `judged_ids`.
    """
    if isinstance(prompt, str):
        return prompt + answer
    return render(tokenizer, [*prompt, {"role": ASSISTANT, "content": answer}])


def judged_ids(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of what a reward model reads, cut to `max_length` where its service cuts them: at the end."""
    ids: list[list[int]] = []
    of_one_kind = itertools.groupby(zip(prompts, answers, strict=True), key=lambda pair: isinstance(pair[0], str))
    for is_text, pairs in of_one_kind:
        texts = [judged_text(tokenizer, prompt, answer) for prompt, answer in pairs]
        ids += tokenizer(texts, truncation=True, max_length=max_length, add_special_tokens=is_text)["input_ids"]
    return ids


def assistant_spans(tokenizer: Any, turns: Conversation, *, first: int = 0) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and from where to where the assistant wrote: what it says and the token that ends it.

    Turns before number `first` are left out. The template is asked for the conversation up to each turn; what the turn
    adds is the assistant's. Where it renders earlier turns otherwise when more follow, what the turn says is looked for
    behind its header.

    Raises:
        DataError: what an assistant's turn says is not in the rendered conversation.
    """
    text = render(tokenizer, turns)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != ASSISTANT or number < first:
            continue
        start = common_length(render(tokenizer, turns[:number], prompt=True) if number else "", text)
        upto = render(tokenizer, turns[: number + 1])
        said = turn["content"].strip()
        if text.startswith(upto) and said in text[start : len(upto)]:
            stop = len(upto)
            inside = text[start:stop]
            # A line break behind the token that ends the turn belongs to the template, and nobody generates it.
            if _ends_with_special(tokenizer, inside.rstrip()):
                stop = start + len(inside.rstrip())
        else:
            at = text.find(said, start)
            if at < 0:
                raise DataError(
                    f"the chat template does not show turn {number + 1} of a conversation as it was written "
                    f"({said!r:.60}): give a template that keeps every turn, with --chat-template"
                )
            stop = at + len(said)
            stop += len(_special_at(tokenizer, text, stop))
        spans.append((start, stop))
    return text, spans


def marked_by_template(tokenizer: Any, turns: Conversation) -> tuple[list[int], list[bool]] | None:
    """Token ids and which of them the template marks as the assistant's ({% generation %}); None if it marks none."""
    if not MARKED.search(tokenizer.chat_template):
        return None
    render(tokenizer, turns)  # for its error
    encoded = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with together."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def tokens_within(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens, given as the characters [start, stop) that each stands for, lie within the spans."""
    return [any(start <= a and b <= stop and a < stop for start, stop in spans) for a, b in offsets]


def _special_tokens(tokenizer: Any) -> list[str]:
    marked = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*marked, *tokenizer.all_special_tokens]


def _ends_with_special(tokenizer: Any, text: str) -> bool:
    return any(text.endswith(token) for token in _special_tokens(tokenizer))


def _special_at(tokenizer: Any, text: str, place: int) -> str:
    """The special token at this place, white space in front of it included; "" if there is none."""
    behind = text[place:]
    blank = behind[: len(behind) - len(behind.lstrip())]
    for token in _special_tokens(tokenizer):
        if behind[len(blank) :].startswith(token):
            return blank + token
    return ""
