"""Render conversations with the policy's chat template to exactly the tokens of `apply_chat_template`.

Failure modes: template and tokenizer both add a begin-of-text token; a template silently drops a system message; a
conversation is rendered with another template than in training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import TemplateError

from plaudit.errors import ConfigError
from plaudit.policy.tokenizer import Tokenizer
from plaudit.wire import ChatMessage


class ChatTemplateError(ConfigError):
    """A chat template is missing, or refuses a conversation."""


def use_chat_template(tokenizer: Tokenizer, file: Path | None, source: str) -> None:
    """Set the tokenizer's chat template from `file`, so that it is saved with it. Without a file it must have one.

    Raises:
        ChatTemplateError: the file can't be read, or there is no template.
    """
    if file is not None:
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"prompts.chat_template={str(file)!r} can't be read: {error}") from error
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"policy={source!r} has no chat template for prompts.messages_column: give one with "
            "--prompts.chat-template FILE, or plain prompts with --prompts.column"
        )


def render(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[ChatMessage]], where: Callable[[int], str]
) -> list[list[int]]:
    """The tokens of each conversation, up to the beginning of the assistant's next turn.

    All special tokens come from the template; the tokenizer adds none. `where(i)` names conversation i in errors.

    Raises:
        ChatTemplateError: the template refuses a conversation, or leaves out its system message.
    """
    texts = [_rendered(tokenizer, messages, where(i)) for i, messages in enumerate(conversations)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ids


def _rendered(tokenizer: Tokenizer, messages: Sequence[ChatMessage], where: str) -> str:
    try:
        text = _apply(tokenizer, messages)
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
        _apply(tokenizer, messages)
    except (TemplateError, TypeError, ValueError, IndexError):
        return False
    return True


def _apply(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> str:
    text: str = tokenizer.apply_chat_template(
        [message.model_dump() for message in messages], add_generation_prompt=True, tokenize=False
    )
    return text
