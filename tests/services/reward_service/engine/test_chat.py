"""`--join chat`: conversations through the judge's own template, token for token as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.tiny_judges import MAX_TOKENS, tiny_judge
from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine import chat
from plaudit.reward_service.engine.batching import Chat
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.settings import Settings

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{{ m.role[0] }} : {{ m.content | trim }} {{ eos_token }}\n{% endfor %}"
)
"""Writes the special tokens itself, as chat templates do."""
SYSTEM, QUESTION, ANSWER = ("system", "be kind"), ("user", "good film ?"), ("assistant", "a bad one !")
CHATS = [
    Chat((QUESTION, ANSWER)),
    Chat((SYSTEM, QUESTION, ANSWER)),
    Chat((QUESTION, ANSWER, ("user", "why ?"), ("assistant", "plot"))),
    Chat((("user", ""), ("assistant", ""))),
    Chat((("assistant", "hello"), ("assistant", "hello"))),
]


def with_template(directory: Path, template: str = TEMPLATE) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def scorer_of(directory: Path, **settings: Any) -> TransformersScorer:
    return load_scorer(Settings(model=str(directory), join="chat", **settings))


def by_transformers(directory: Path, conversation: Chat) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": role, "content": content} for role, content in conversation.turns]
    return tokenizer.apply_chat_template(messages, tokenize=True)


@pytest.mark.parametrize(
    ("family", "batching"), [("distilbert", "packed"), ("roberta", "packed"), ("qwen2", "padded"), ("gpt2", "padded")]
)
def test_tokens_are_those_of_apply_chat_template_and_scores_those_of_transformers(
    tmp_path: Path, family: str, batching: str
) -> None:
    directory = with_template(tiny_judge(tmp_path, family))
    served = scorer_of(directory)
    assert served.batching == batching
    encodings = served.encode(CHATS)
    expected = [by_transformers(directory, each)["input_ids"] for each in CHATS]
    assert [list(encoded.ids) for encoded in encodings] == expected
    assert not any(encoded.truncated or encoded.refused for encoded in encodings)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0].tolist() for ids in expected]
    for got, wanted in zip(served.score(encodings, 0), rows, strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_a_model_that_takes_token_types_gets_those_of_transformers(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path, family="bert")
    with_template(directory, "[CLS] {% for m in messages %}{{ m.content }} [SEP] {% endfor %}")
    described = directory / "tokenizer_config.json"
    inputs = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    described.write_text(json.dumps(json.loads(described.read_text()) | inputs))
    for encoded, each in zip(scorer_of(directory).encode(CHATS), CHATS, strict=True):
        expected = by_transformers(directory, each)
        assert (encoded.ids, encoded.type_ids) == (expected["input_ids"], expected["token_type_ids"])


def test_the_first_token_is_there_once(tmp_path: Path) -> None:
    """The tokenizer of this judge puts one in front of every text, and so does the template."""
    directory = with_template(tiny_judge(tmp_path, "roberta"))
    [encoded] = scorer_of(directory).encode(CHATS[:1])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("good")["input_ids"][0] == tokenizer.bos_token_id
    assert list(encoded.ids).count(tokenizer.bos_token_id) == 1


def test_a_text_that_came_by_another_protocol_is_taken_as_rendered_and_a_pair_as_two_turns(tmp_path: Path) -> None:
    directory = with_template(tiny_judge(tmp_path, "roberta"))
    served = scorer_of(directory)
    rendered = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": "good film ?"}, {"role": "assistant", "content": "a bad one !"}], tokenize=False
    )
    whole, pair, expected = served.encode([(rendered, None), ("good film ?", "a bad one !"), CHATS[0]])
    assert whole == pair == expected


def test_without_a_template_the_service_does_not_start_and_names_the_flag(tmp_path: Path) -> None:
    directory = tiny_judge(tmp_path / "judge", "roberta")
    with pytest.raises(ModelError, match=r"no chat template .* --chat-template FILE"):
        scorer_of(directory)
    template = tmp_path / "template.jinja"
    with pytest.raises(ModelError, match=r"template\.jinja can't be read"):
        scorer_of(directory, chat_template=template)
    template.write_text(TEMPLATE)
    by_file = scorer_of(directory, chat_template=template)
    template.write_text(TEMPLATE.replace(" : ", " - "))
    by_another = scorer_of(directory, chat_template=template)
    own = load_scorer(Settings(model=str(directory)))
    assert len({by_file.revision, by_another.revision, own.revision}) == 3
    assert by_file.encode(CHATS[:1]) != by_another.encode(CHATS[:1])
    with_template(directory)
    assert by_file.encode(CHATS) == scorer_of(directory).encode(CHATS)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only tools') }}", "fails on a plain conversation of user and assistant: only tools"),
        ("{% for m in messages %}{{ m.content.a.b }}{% endfor %}", "fails on a plain conversation"),
        ("{% if %}", "fails on a plain conversation"),
        ("{{ messages[0].content }}", "leaves out what user or assistant said"),
        ("{% for m in messages %}{{ m.content }}{% endfor %} " + "good " * 80, "leaves no room for text"),
        ("{{ 'x' * 1000000 }}", "made 1000000 characters"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_the_start(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        scorer_of(with_template(tiny_judge(tmp_path, "roberta"), template))


def test_a_template_that_goes_on_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDER_S", 0.05)
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match=r"it took more than 0\.05 s"):
        scorer_of(with_template(tiny_judge(tmp_path, "roberta"), endless))


def test_a_role_that_the_template_refuses_is_told_of_its_conversation_alone(tmp_path: Path) -> None:
    served = scorer_of(with_template(tiny_judge(tmp_path, "roberta")))
    first, second, third = served.encode([CHATS[0], Chat((("pirate", "arr"), ANSWER)), CHATS[1]])
    assert second.refused == "the chat template refuses this conversation: no role pirate"
    assert [first, third] == served.encode(CHATS[:2])


def turn(role: str, words: int) -> tuple[str, str]:
    return role, " ".join(["good"] * words)


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_and_keeps_system_and_question(tmp_path: Path) -> None:
    directory = with_template(tiny_judge(tmp_path, "roberta"))
    served = scorer_of(directory)
    system, last = turn("system", 4), (turn("user", 7), turn("assistant", 5))
    # A turn takes its words and 3 tokens more, the conversation one: 7 + 10 + 8 + 1 = 26 of 64 are of what stays.
    exchanges = [(turn("user", 5), turn("assistant", 5)) for _ in range(4)]  # 16 tokens each
    turns = [each for exchange in exchanges for each in exchange]
    [fits] = served.encode([Chat((system, *turns[4:], *last))])  # 26 + 32 = 58
    assert (len(fits.ids), fits.truncated) == (58, False)
    [shortened] = served.encode([Chat((system, *turns, *last))])
    assert (shortened.ids, shortened.truncated) == (fits.ids, True)
    [without_system] = served.encode([Chat((*turns, *last))])
    assert (list(without_system.ids), without_system.truncated) == (
        by_transformers(directory, Chat((*turns[4:], *last)))["input_ids"],
        True,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_exchange_that_is_too_long_is_cut_like_any_text(tmp_path: Path, side: str) -> None:
    directory = with_template(tiny_judge(tmp_path, "roberta"))
    served = scorer_of(directory, truncation_side=side)
    long = Chat((SYSTEM, turn("user", 40), turn("assistant", 40)))
    older = Chat((SYSTEM, QUESTION, ANSWER, *long.turns[1:]))
    ids = by_transformers(directory, long)["input_ids"]
    expected = ids[:MAX_TOKENS] if side == "right" else ids[-MAX_TOKENS:]
    for encoded in served.encode([long, older]):
        assert (list(encoded.ids), encoded.truncated) == (expected, True)


def test_a_megabyte_is_cut_before_it_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = scorer_of(with_template(tiny_judge(tmp_path, "roberta")))
    rendered: list[int] = []
    apply = served.tokenizer.apply_chat_template

    def watched(messages: list[dict[str, str]], **options: Any) -> Any:
        rendered.append(sum(len(message["content"]) for message in messages))
        return apply(messages, **options)

    monkeypatch.setattr(served.tokenizer, "apply_chat_template", watched)
    turns = [turn("user", 1000), turn("assistant", 1000)] * 100
    [encoded] = served.encode([Chat((*turns, QUESTION, ANSWER))])
    assert (encoded.truncated, encoded.refused) == (True, None)
    assert max(rendered) <= 64 * MAX_TOKENS
    [huge] = served.encode([Chat((("user", "good " * 200_000), ANSWER))])
    assert huge.truncated
