"""Conversations made texts on the client's side, for servers that take nothing else."""

import sys
from pathlib import Path
from typing import Any

import pytest

from harness.foreign import stand_ins as foreign
from harness.tiny_models import tiny_llama2_tokenizer
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.rewards.rendering import ByTemplate
from plaudit.rewards.settings import RewardSettings
from plaudit.wire import ChatMessage, RewardItem

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Hi")]
ITEM = RewardItem(prompt=CHAT, response="Hello", fields={"label": 1})


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    tokenizer = tiny_llama2_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_prompt_and_response_together_are_what_the_tokenizer_writes(tokenizer_dir: Path) -> None:
    rendering = ByTemplate(str(tokenizer_dir))
    whole = rendering(ITEM, first_token=True)
    assert (whole.prompt, whole.response) == ("<s>[system]Be kind.</s>[user]Hi</s>[assistant]", "Hello</s>")
    assert rendering(ITEM, first_token=False).prompt == "[system]Be kind.</s>[user]Hi</s>[assistant]"
    assert whole.fields == ITEM.fields


def test_a_template_that_writes_the_past_in_another_way_still_gives_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% if add_generation_prompt %}?{% endif %}{% for m in messages %}{{ m.content }}|{% endfor %}")
    rendered = ByTemplate(str(file))(ITEM, first_token=True)
    assert (rendered.prompt, rendered.response) == ("", "Be kind.|Hi|Hello|")


@pytest.mark.parametrize(("kind", "first"), [("tei", ""), ("openrlhf", "<s>")])
def test_the_first_token_goes_along_where_the_server_adds_none(tokenizer_dir: Path, kind: str, first: str) -> None:
    server, needed = foreign.SPOKEN[kind]
    with foreign.serving(server) as url:
        asked = RewardSettings.of(url=(url,), kind=kind, render=str(tokenizer_dir), patience_s=30.0, **needed)
        with RewardClient(asked) as client:
            client.connect()
            got = client.score([CHAT, "a text"], ["Hello", " more"])
            with pytest.raises(RewardRejected, match="can't write this conversation: no tools"):
                client.score([[ChatMessage(role="tool", content="x")]], ["y"])
    whole = f"{first}[system]Be kind.</s>[user]Hi</s>[assistant]Hello</s>"
    assert got == [foreign.logits(whole)[1], foreign.logits("a text more")[1]]


def test_what_cannot_render_is_refused_when_the_client_is_made(tmp_path: Path) -> None:
    def client(named: str) -> RewardClient:
        return RewardClient(RewardSettings.of(url=("http://127.0.0.1:1",), render=named))

    with pytest.raises(ConfigError, match="neither a file here nor a tokenizer"):
        client(str(tmp_path / "nothing"))
    tiny_llama2_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no chat template"):
        client(str(tmp_path))


@pytest.mark.parametrize("missing", ["transformers", "jinja2"])
def test_without_its_libraries_the_extra_is_named(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, missing: Any
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'plaudit\[render\]'"):
        ByTemplate(str(tokenizer_dir))
