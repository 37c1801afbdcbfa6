"""Render conversations to text for reward servers that accept only texts: `--reward.render MODEL_OR_TEMPLATE`.

The template must be the reward model's, so it has to be named and is never guessed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from plaudit.errors import ConfigError
from plaudit.rewards.errors import RewardRejected
from plaudit.wire import ChatMessage, RewardItem

Messages = list[dict[str, str]]


class Rendering(Protocol):
    """Renders a conversation's prompt and response to text."""

    def __call__(self, item: RewardItem, *, first_token: bool) -> RewardItem:
        """The item as texts. `first_token`: keep the begin-of-text token, for servers that don't add it."""


class ByTemplate:
    """Renders with a tokenizer's chat template, or with a template file. Raises `ConfigError`.

    Needs transformers and jinja2 (`plaudit[render]`), unlike the rest of the client.
    """

    def __init__(self, named: str) -> None:
        self._named = named
        self._first_token = ""
        self._apply = self._by_file(Path(named)) if Path(named).is_file() else self._by_tokenizer(named)

    def __call__(self, item: RewardItem, *, first_token: bool) -> RewardItem:
        """The item with prompt and response as texts. Raises `RewardRejected` if the template fails on it."""
        assert not isinstance(item.prompt, str)
        prompt = as_dicts(item.prompt)
        try:
            before = self._apply(prompt, True)
            whole = self._apply([*prompt, {"role": "assistant", "content": item.response}], False)
        except Exception as error:  # a template can raise anything
            raise RewardRejected(f"reward.render={self._named!r} can't write this conversation: {error}") from error
        if not first_token:
            before, whole = before.removeprefix(self._first_token), whole.removeprefix(self._first_token)
        # Templates may render a prompt differently once it has an answer.
        split = len(before) if whole.startswith(before) else 0
        try:
            return RewardItem(prompt=whole[:split], response=whole[split:], fields=item.fields)
        except ValidationError as error:
            raise RewardRejected(f"a conversation can't be sent as one text: {error}") from error

    def _by_tokenizer(self, named: str) -> Callable[[Messages, bool], str]:
        transformers = _transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(named, trust_remote_code=False)
        except Exception as error:
            raise ConfigError(
                f"reward.render={named!r} is neither a file here nor a tokenizer that can be loaded: "
                f"{' '.join(str(error).split()):.300}"
            ) from error
        if not tokenizer.chat_template:
            raise ConfigError(f"reward.render={named!r} has no chat template; name a file that holds one")
        self._first_token = tokenizer.bos_token or ""

        def apply(messages: Messages, to_be_answered: bool) -> str:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_be_answered))

        return apply

    def _by_file(self, file: Path) -> Callable[[Messages, bool], str]:
        _transformers()
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward.render={self._named!r} can't be read: {error}") from error

        def apply(messages: Messages, to_be_answered: bool) -> str:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=to_be_answered,
                bos_token="",
                eos_token="",
            )
            return str(rendered[0])

        return apply


def as_dicts(messages: list[ChatMessage]) -> Messages:
    """The messages as dicts, for templates and functions."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _transformers() -> Any:
    try:
        import jinja2  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"reward.render needs transformers and jinja2: pip install 'plaudit[render]' ({error})"
        ) from error
    return transformers
