"""Which tokens of a conversation are learnt: worked by hand for a ChatML template, and for templates of other kinds."""

import json
from typing import Any

import pytest

from harness.tiny_models import CHATML, chat_tokenizer, tiny_llama2_tokenizer
from plaudit.data.chat_templates import ChatTemplateError, assistant_spans, judged_ids, judged_text
from plaudit.data.conversations import conversation, is_conversation
from plaudit.data.examples import IGNORED, Example, rows_of
from plaudit.data.tables import DataError

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How was it?"},
    {"role": "assistant", "content": "Good."},
    {"role": "user", "content": "And the plot?"},
    {"role": "assistant", "content": "Bad."},
]
WITHOUT_HISTORY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def example(turns: list[dict[str, str]], first: int = 0) -> Example:
    return Example(turns=tuple((turn["role"], turn["content"]) for turn in turns), first=first)


def learnt(tokenizer: Any, one: Example, max_length: int = 500) -> tuple[str, str]:
    """The row as text, and the text of what is learnt of it."""
    rows = rows_of(tokenizer, [one], max_length)
    (ids,), (labels,) = rows.ids, rows.labels
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize("template", [CHATML, MARKED, WITHOUT_HISTORY])
def test_of_a_chatml_conversation_the_answers_and_the_tokens_that_end_them_are_learnt(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    whole, of_it = learnt(tokenizer, example(TURNS))
    think = "<think></think>" if template is WITHOUT_HISTORY else ""
    assert whole == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow was it?<|im_end|>\n"
        "<|im_start|>assistant\nGood.<|im_end|>\n<|im_start|>user\nAnd the plot?<|im_end|>\n"
        f"<|im_start|>assistant\n{think}Bad.<|im_end|>\n"
    )
    assert of_it == f"Good.<|im_end|>{think}Bad.<|im_end|>"


def test_the_mask_of_a_short_conversation_token_by_token() -> None:
    tokenizer = chat_tokenizer()
    rows = rows_of(tokenizer, [example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])], 99)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    newline, a, b = (tokenizer.encode(text)[0] for text in ("\n", "a", "b"))
    user, assistant = tokenizer.encode("user"), tokenizer.encode("assistant")
    ids = [start, *user, newline, a, end, newline, start, *assistant, newline, b, end, newline]
    assert rows.ids == [ids]
    assert rows.labels == [[IGNORED] * (len(ids) - 3) + [b, end, IGNORED]]


def test_turns_of_the_prompt_are_not_learnt_whoever_wrote_them() -> None:
    assert learnt(chat_tokenizer(), example(TURNS, first=4))[1] == "Bad.<|im_end|>"


def test_where_no_token_ends_a_turn_the_end_of_text_token_does() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    whole, of_it = learnt(tokenizer, example(TURNS[1:3]))
    assert whole == f"user: How was it?\nassistant: Good.\n{tokenizer.eos_token}"
    assert of_it == f"assistant: Good.\n{tokenizer.eos_token}"  # without a prompt for it the header is its own


def test_an_answer_that_the_template_does_not_show_is_named() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role + m.content[:3] + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(
        ChatTemplateError, match=r"does not show turn 3 of a conversation as it was written \('Good\.'\)"
    ):
        assistant_spans(tokenizer, TURNS)


def test_a_completion_is_learnt_with_its_end_and_without_its_prompt() -> None:
    tokenizer = chat_tokenizer()
    whole, of_it = learnt(tokenizer, Example(" was good.", prompt="This movie"))
    assert (whole, of_it) == (f"This movie was good.{tokenizer.eos_token}", f" was good.{tokenizer.eos_token}")
    llama = tiny_llama2_tokenizer()
    rows = rows_of(llama, [Example(" was good.", prompt="This movie")], 99)
    assert rows.ids[0][0] == llama.bos_token_id
    assert rows.labels[0].count(IGNORED) == 1 + len(llama("This movie", add_special_tokens=False)["input_ids"])


def test_what_is_cut_is_counted_and_a_row_without_anything_to_learn_is_left_out() -> None:
    tokenizer = chat_tokenizer()
    rows = rows_of(tokenizer, [example(TURNS[1:3]), Example("b", prompt="a " * 50)], 24)
    assert (len(rows.ids), rows.cut, rows.without_loss) == (1, 2, 1)
    assert rows.lines(24)[1:] == [
        "max_length=24 cut the end off 2 examples",
        "left out: 1 examples whose prompt alone fills max_length=24",
    ]


def test_a_judge_reads_the_answer_as_the_next_turn_and_no_special_token_twice() -> None:
    tokenizer = tiny_llama2_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert judged_text(tokenizer, TURNS[:2], " Fine.") == "<s>Be kind.How was it? Fine."
    mixed = judged_ids(tokenizer, ["a", TURNS[:2], "b"], [" c", " d", " e"], 50)
    assert [row.count(tokenizer.bos_token_id) for row in mixed] == [1, 1, 1]
    assert mixed[0] == tokenizer("a c")["input_ids"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("hello", "'hello' is no conversation"),
        ([], "is no conversation"),
        ([{"role": "user"}], "turn 1 is {'role': 'user'}"),
        ([{"role": "user", "content": [{"type": "image"}]}], "needs a role and a content that are texts"),
    ],
)
def test_a_cell_that_is_no_conversation_of_texts_is_named(cell: Any, message: str) -> None:
    with pytest.raises(DataError, match="somewhere: ") as error:
        conversation(cell, "somewhere")
    assert message in str(error.value)


def test_arrays_of_parquet_are_conversations() -> None:
    import numpy as np

    cell = np.array(TURNS[:2], dtype=object)
    assert is_conversation(cell)
    assert conversation(cell, "") == TURNS[:2]
    assert conversation(json.dumps(TURNS), "") == TURNS  # as a CSV file has it
