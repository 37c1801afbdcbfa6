"""Where responses end: the same for every way of sampling, and the judge reads what stands in front of it."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from harness.tiny_models import tiny_gpt2, tiny_llama2_tokenizer, tiny_tokenizer
from plaudit.errors import ConfigError
from plaudit.policy.endings import Endings, StopStrings
from plaudit.policy.generation import Draws, generate
from plaudit.policy.samples import Samples
from plaudit.policy.static_generation import LOOK_EVERY, StaticGenerator
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.settings.policy import GenerationSettings

TOKENIZER: Any = tiny_tokenizer()
QUERIES = [[5 + i, 6, 7 + i] for i in range(40)]
SETTINGS = GenerationSettings(min_new_tokens=40, max_new_tokens=40)


def rows(samples: Samples) -> list[list[int]]:
    return [ids[keep].tolist() for ids, keep in zip(samples.response_ids, samples.mask, strict=True)]


def text(ids: list[int]) -> str:
    decoded: str = TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)
    return decoded


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gpt2()


@pytest.fixture(scope="module")
def free(model: Any) -> list[list[int]]:
    """The responses without stop strings."""
    return rows(generate(model, QUERIES, drawn(SETTINGS), SETTINGS, TOKENIZER))


def drawn(settings: GenerationSettings) -> Draws:
    return Draws.of(settings, len(QUERIES), seed=3, step=1)


def stopped_by_hand(response: list[int], stop: tuple[str, ...]) -> list[int]:
    """The shortest beginning whose whole text has a stop string, else all of it."""
    beginnings = (response[:n] for n in range(1, len(response) + 1))
    return next((ids for ids in beginnings if any(s in text(ids) for s in stop)), response)


def common_pieces(free: list[list[int]]) -> tuple[str, ...]:
    """Two-character strings that many of the responses have, most of them across two tokens."""
    whole = [text(ids) for ids in free]
    pairs = {a + b for response in whole for a, b in itertools.pairwise(response) if "\ufffd" not in a + b}
    return tuple(sorted(pairs, key=lambda pair: -sum(pair in response for response in whole))[:12])


@pytest.mark.parametrize("way", ["cached", "uncached", "fixed shapes"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    model: Any, free: list[list[int]], way: str
) -> None:
    stop = common_pieces(free)
    settings = dataclasses.replace(SETTINGS, stop=stop)
    if way == "fixed shapes":
        static = StaticGenerator(model, settings, TOKENIZER)
        static(QUERIES, Draws.of(settings, len(QUERIES), seed=9, step=0))  # the second time into a used cache
        samples = static(QUERIES, drawn(settings))
    else:
        way_of = {"cached": generate, "uncached": generate_uncached}[way]
        samples = way_of(model, QUERIES, drawn(settings), settings, TOKENIZER)
    expected = [stopped_by_hand(response, stop) for response in free]
    assert rows(samples) == expected
    lengths = [len(response) for response in expected]
    assert min(lengths) < LOOK_EVERY < max(lengths)  # some end before anybody looks, some later
    crossing = [r for r in expected if len(r) < 40 and not any(s in text(r[-1:]) for s in stop)]
    assert crossing  # stop strings across token boundaries
    endings = Endings.of(model, TOKENIZER, settings)
    assert endings.ended(samples) == [
        any(s in text(response) for s in stop) or response[-1] == 0 for response in expected
    ]
    for response, judged in zip(expected, endings.texts(samples), strict=True):
        whole = text([token for token in response if token != 0])
        assert whole.startswith(judged)
        assert not any(s in judged for s in stop)
        assert judged == whole or any(whole[len(judged) :].startswith(s) for s in stop)


def test_a_stop_string_of_single_bytes_is_found_and_the_prompt_does_not_count() -> None:
    stop = StopStrings(TOKENIZER, ["映画"])
    ids = TOKENIZER("a 映画 b")["input_ids"]
    query = TOKENIZER("映画 映")["input_ids"]
    assert len(TOKENIZER("映画")["input_ids"]) > 2
    length = stop.first(query, ids)
    assert length is not None
    assert text(ids[:length]) == "a 映画"
    assert not any(stop.complete([(query, ids[:n]) for n in range(1, length)]))
    assert stop.first(query, TOKENIZER("画 b")["input_ids"]) is None


def test_a_decoder_that_takes_away_spaces_hides_no_stop_string() -> None:
    tokenizer: Any = tiny_llama2_tokenizer()
    query = tokenizer("The film")["input_ids"]
    response = tokenizer("The film was good")["input_ids"][len(query) :]
    stop = StopStrings(tokenizer, [" was"])
    length = stop.first(query, response)
    assert length is not None
    assert tokenizer.decode([*query, *response[:length]], skip_special_tokens=True) == "The film was"


def test_an_end_token_that_the_tokenizer_does_not_call_special_is_no_text(model: Any) -> None:
    ends = TOKENIZER("d")["input_ids"]
    samples = Samples.from_lists([[5], [5]], [[70, *ends], [*ends, 70, 71]], 0)
    endings = Endings(TOKENIZER, ends, StopStrings(TOKENIZER, ()))
    assert endings.ended(samples) == [True, False]
    assert endings.texts(samples)[0] == text([5, 70]).removeprefix(text([5]))


def test_lengths_are_drawn_for_openings_and_for_whoever_asks() -> None:
    settings = GenerationSettings(min_new_tokens=4, max_new_tokens=16)
    openings = Draws.of(settings.answering("openings"), 200, seed=0, step=7)
    as_ever = Draws.of(settings, 200, seed=0, step=7)
    assert torch.equal(openings.lengths, as_ever.lengths)
    assert torch.equal(openings.uniforms, as_ever.uniforms)
    for kind in ("text", "messages"):
        assert set(Draws.of(settings.answering(kind), 200, seed=0, step=7).lengths.tolist()) == {16}
    asked = dataclasses.replace(settings, draw_lengths=True).answering("messages")
    assert torch.equal(Draws.of(asked, 200, seed=0, step=7).lengths, as_ever.lengths)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generation\.stop has an empty text"):
        GenerationSettings(stop=("",))
