"""Conversations become the tokens that the policy's own chat template gives, or one line says why not."""

from pathlib import Path
from typing import Any

import pytest

from harness.tiny_models import CHAT_TEMPLATES, tiny_chat_tokenizer, tiny_tokenizer
from plaudit.data.chat_templates import ChatTemplateError, render, use_chat_template
from plaudit.wire import ChatMessage

USER = {"role": "user", "content": " How was the film? "}
MORE = [USER, {"role": "assistant", "content": "Good."}, {"role": "user", "content": "Why?\n\n映画"}]
SYSTEM = {"role": "system", "content": "Be short."}


def messages(*rows: dict[str, str]) -> list[ChatMessage]:
    return [ChatMessage.model_validate(row) for row in rows]


def where(i: int) -> str:
    return f"row {i + 1}"


@pytest.mark.parametrize("style", CHAT_TEMPLATES)
def test_tokens_are_those_of_apply_chat_template(style: str) -> None:
    tokenizer: Any = tiny_chat_tokenizer(style)
    rows = [[USER], MORE] if style == "gemma" else [[USER], MORE, [SYSTEM, USER], [SYSTEM, *MORE]]
    rendered = render(tokenizer, [messages(*row) for row in rows], where)
    assert rendered == [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False) for row in rows
    ]
    assert len({tuple(ids) for ids in rendered}) == len(rows)


@pytest.mark.parametrize("style", ["llama3", "gemma"])
def test_a_begin_token_of_template_and_tokenizer_stands_once(style: str) -> None:
    tokenizer: Any = tiny_chat_tokenizer(style)
    begin = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == begin  # the tokenizer adds one to a text
    (ids,) = render(tokenizer, [messages(USER)], where)
    assert ids.index(begin) == 0
    assert ids.count(begin) == 1


def test_a_template_that_takes_no_system_message_is_one_line_that_says_what_to_do() -> None:
    tokenizer: Any = tiny_chat_tokenizer("gemma")
    with pytest.raises(ChatTemplateError, match=r"row 2: .* takes no system message \(System role not supp.*; leave"):
        render(tokenizer, [messages(USER), messages(SYSTEM, USER)], where)


def test_roles_that_a_template_refuses_are_named() -> None:
    tokenizer: Any = tiny_chat_tokenizer("gemma")
    with pytest.raises(ChatTemplateError, match=r"row 1: .* the roles user, user \(Conversation roles must alternate"):
        render(tokenizer, [messages(USER, USER)], where)


def test_a_system_message_that_a_template_would_leave_out_is_refused() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"row 1: .* leaves out the system message 'Be short\.'"):
        render(tokenizer, [messages(SYSTEM, USER)], where)


def test_a_template_comes_from_a_file_and_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(ChatTemplateError, match=r"policy='p' has no chat template.* --prompts\.chat-template, "):
        use_chat_template(tokenizer, None, "policy='p'", "prompts.chat_template")
    use_chat_template(tokenizer, file, "policy='p'")
    assert tokenizer.decode(render(tokenizer, [messages(USER)], where)[0]) == "[ How was the film? ]"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(tokenizer).from_pretrained(tmp_path / "saved").chat_template == file.read_text()
    with pytest.raises(ChatTemplateError, match=r"missing\.jinja"):
        use_chat_template(tokenizer, tmp_path / "missing.jinja", "policy='p'")
