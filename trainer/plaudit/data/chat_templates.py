"""Conversations as tokens, by a model's own chat template: token for token what `apply_chat_template` gives.

Prompts for the policy, whole conversations for a judge, and what of a conversation the assistant wrote. What would be
wrong here: a begin-of-text token that template and tokenizer both add, a system message or a part of an answer that a
template leaves out without a word, a loss on what the user said, or an end-of-turn token that nothing learns to write.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from plaudit.data.conversations import ASSISTANT, Conversation, Prompt
from plaudit.errors import ConfigError
from plaudit.policy.tokenizer import Tokenizer
from plaudit.wire import ChatMessage

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a template: what follows is written by the assistant."""


class ChatTemplateError(ConfigError):
    """A chat template is missing, or refuses a conversation."""


def use_chat_template(
    tokenizer: Tokenizer, file: Path | str | None, named: str, setting: str = "chat_template"
) -> None:
    """Gives the tokenizer the template in `file`, so that it is saved with it; without a file it must have its own.

    `named` is the model as its setting names it and `setting` the file's setting, both for errors.

    Raises:
        ChatTemplateError: the file can't be read, or there is no template at all.
    """
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"{setting}={str(file)!r} can't be read: {error}") from error
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"{named} has no chat template, and the data holds conversations: give one as a Jinja file with "
            f"--{setting.replace('_', '-')}, or name a model that was made for conversations"
        )


def render(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[ChatMessage]], where: Callable[[int], str]
) -> list[list[int]]:
    """Each conversation up to the point where the assistant's next turn begins, as tokens.

    The template writes every special token; the tokenizer adds none. `where(i)` names conversation i in errors.

    Raises:
        ChatTemplateError: the template refuses a conversation, or leaves out its system message.
    """
    texts = [_prompt(tokenizer, messages, where(i)) for i, messages in enumerate(conversations)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ids


def _prompt(tokenizer: Tokenizer, messages: Sequence[ChatMessage], where: str) -> str:
    try:
        text = _apply(tokenizer, [message.model_dump() for message in messages], prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        without_system = [message for message in messages if message.role != "system"]
        if len(without_system) < len(messages) and _renders(tokenizer, without_system):
            raise ChatTemplateError(
                f"{where}: the policy's chat template takes no system message ({error}); leave out --prompts.system or "
                "the row's own, or give a template that takes one with --prompts.chat-template FILE"
            ) from error
        roles = ", ".join(message.role for message in messages)
        raise ChatTemplateError(
            f"{where}: the policy's chat template refuses the conversation with the roles {roles} ({error}); mend or "
            "remove the row, or give another template with --prompts.chat-template FILE"
        ) from error
    for message in messages:
        if message.role == "system" and message.content.strip() not in text:
            raise ChatTemplateError(
                f"{where}: the policy's chat template leaves out the system message {message.content!r:.60}; leave it "
                "out yourself, or give a template that takes one with --prompts.chat-template FILE"
            )
    return text


def _renders(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> bool:
    try:
        _apply(tokenizer, [message.model_dump() for message in messages], prompt=True)
    except (TemplateError, TypeError, ValueError, IndexError):
        return False
    return True


def _apply(tokenizer: Tokenizer, turns: Conversation, *, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
    return text


def rendered(tokenizer: Tokenizer, turns: Conversation, *, prompt: bool = False) -> str:
    """The conversation as text; as a `prompt`, up to where the assistant's next turn begins.

    Raises:
        ChatTemplateError: the template refuses these turns.
    """
    try:
        text = _apply(tokenizer, turns, prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ChatTemplateError(
            f"the chat template refuses a conversation of {roles} ({error}): mend or remove it"
        ) from error
    return text


def judged_text(tokenizer: Any, prompt: Prompt, answer: str) -> str:
    """What a reward model reads: prompt and answer in one, or the conversation with the answer as its next turn.

    A rendered conversation holds its special tokens already; see `judged_ids`.
    """
    if isinstance(prompt, str):
        return prompt + answer
    return rendered(tokenizer, [*prompt, {"role": ASSISTANT, "content": answer}])


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
        ChatTemplateError: what an assistant's turn says is not in the rendered conversation.
    """
    text = rendered(tokenizer, turns)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != ASSISTANT or number < first:
            continue
        start = common_length(rendered(tokenizer, turns[:number], prompt=True) if number else "", text)
        upto = rendered(tokenizer, turns[: number + 1])
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
                raise ChatTemplateError(
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
    rendered(tokenizer, turns)  # for its error
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
