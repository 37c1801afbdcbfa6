"""The judge reads what was written: prompt and response together are the whole, to the last space and character."""

from pathlib import Path
from typing import Any

import pytest

from harness.tiny_models import tiny_gpt2, tiny_llama2_tokenizer, tiny_tokenizer, tiny_wordpiece_tokenizer
from plaudit.data.prompts import load_prompts
from plaudit.policy.samples import Samples
from plaudit.policy.texts import (
    BROKEN,
    cut_between_characters,
    end_tokens,
    prompt_texts,
    response_texts,
    tokens_in_front,
)
from plaudit.settings.data import DataSettings, PromptSettings

TEXT = "This movie was great. I would watch it again \U0001f3ac 映画 déjà vu"
TOKENIZERS = {"gpt2": tiny_tokenizer, "llama2": tiny_llama2_tokenizer}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_and_response_make_the_whole_wherever_it_is_cut_between_characters(kind: str) -> None:
    tokenizer: Any = TOKENIZERS[kind]()
    ids = tokenizer(TEXT)["input_ids"]
    in_front = tokens_in_front(tokenizer)
    cuts = range(len(in_front) + 1, len(ids))
    whole = 0
    for cut in cuts:
        (query,) = cut_between_characters(tokenizer, [ids[len(in_front) :]], [TEXT], [cut - len(in_front)])
        query = [*in_front, *query]
        samples = Samples.from_lists([query], [ids[len(query) :] or [tokenizer.eos_token_id]], 0)
        prompt, response = prompt_texts(tokenizer, [query])[0], response_texts(tokenizer, samples)[0]
        assert prompt + response == TEXT
        assert BROKEN not in prompt
        whole += len(query) == cut
    assert whole > len(cuts) / 3  # most cuts are between characters, and stay where they are


def test_spaces_before_commas_are_not_cleaned_up() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("It was good , really . I do n't know")["input_ids"]
    samples = Samples.from_lists([ids[:6]], [ids[6:]], 0)
    assert prompt_texts(tokenizer, [ids[:6]])[0] + response_texts(tokenizer, samples)[0] == tokenizer.decode(
        ids, clean_up_tokenization_spaces=False
    )


def test_special_tokens_are_no_text_of_a_response_and_an_empty_one_is_empty() -> None:
    tokenizer = tiny_llama2_tokenizer()
    ids, end = tokenizer("This movie was")["input_ids"], tokenizer.eos_token_id
    samples = Samples.from_lists([ids[:-1]] * 2, [[ids[-1], end], [end]], pad_token_id=end)
    assert response_texts(tokenizer, samples)[1] == ""
    assert "</s>" not in response_texts(tokenizer, samples)[0]


def test_only_what_stands_in_front_of_a_text_is_put_in_front_of_a_prompt() -> None:
    assert tokens_in_front(tiny_tokenizer()) == []
    assert tokens_in_front(tiny_llama2_tokenizer()) == [1]
    wordpiece = tiny_wordpiece_tokenizer()
    assert tokens_in_front(wordpiece) == [wordpiece.cls_token_id]  # and not [SEP], which stands behind


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_prompt_ends_inside_a_character_and_each_begins_as_the_tokenizer_begins_texts(
    kind: str, tmp_path: Path
) -> None:
    tokenizer: Any = TOKENIZERS[kind]()
    signs = "这部电影真的很好看我非常喜欢它的故事和演员"
    texts = [signs[i % 20 :] + signs * 12 + str(i) for i in range(60)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    settings = PromptSettings(min_tokens=2, max_tokens=8)
    prompts = load_prompts(DataSettings(str(path), held_out_fraction=0.01), settings, tokenizer, "train", seed=0)
    in_front = tokens_in_front(tokenizer)
    assert len(prompts) > 50
    for ids, prompt in zip(prompts.token_ids, prompts.texts, strict=True):
        assert BROKEN not in prompt
        assert any(text.startswith(prompt) for text in texts)
        assert ids[: len(in_front)] == in_front
        assert 2 <= len(ids) - len(in_front) <= 8 or len(prompt) == 1


def test_a_text_that_holds_the_sign_for_a_broken_character_is_cut_behind_it() -> None:
    tokenizer, text = tiny_tokenizer(), f"a{BROKEN}b"
    ids = tokenizer(text)["input_ids"]
    assert cut_between_characters(tokenizer, [ids], [text], [len(ids) - 1]) == [ids[:-1]]


def test_the_end_tokens_are_the_tokenizers_and_all_that_the_model_names() -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    assert end_tokens(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [7, 0, 9]
    assert end_tokens(model, tokenizer) == [0, 7, 9]
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert end_tokens(model, tokenizer) == []
