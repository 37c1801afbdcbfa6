"""Rollouts: tokens come from the policy that is scored, and a sample does not depend on its company."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from tests.support.tiny_models import ARCHITECTURES, tiny_gpt2, tiny_tokenizer
from trainer.config import GenerationSettings, LoraSettings, PPOHyperparameters
from trainer.data import Prompts
from trainer.models import Policy, add_lora
from trainer.reward_client import Scores
from trainer.rollout import Draws, collect, decode_responses, generate, sample_tokens
from trainer.samples import Samples
from trainer.update import PPOStepper, Sampling

QUERIES = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
SETTINGS = GenerationSettings(min_new_tokens=4, max_new_tokens=16, batch_size=2)
TOKENIZER = tiny_tokenizer()


def rows(samples: Samples) -> list[list[int]]:
    return [ids[keep].tolist() for ids, keep in zip(samples.response_ids, samples.mask, strict=True)]


def draws(count: int = len(QUERIES), settings: GenerationSettings = SETTINGS) -> Draws:
    return Draws.of(settings, count, seed=1, step=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_response_is_the_same_alone_and_in_any_batch(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    together = rows(generate(model, QUERIES, draws(), SETTINGS, TOKENIZER))
    alone = [
        rows(generate(model, [query], draws().rows(i, i + 1), SETTINGS, TOKENIZER))[0]
        for i, query in enumerate(QUERIES)
    ]
    assert together == alone


def test_sampled_tokens_are_those_that_inversion_of_the_scored_distribution_gives() -> None:
    model = tiny_gpt2()
    drawn = draws()
    for i, response in enumerate(rows(generate(model, QUERIES, drawn, SETTINGS, TOKENIZER))):
        row = torch.tensor([QUERIES[i] + response])
        with torch.no_grad():
            cumulative = model(input_ids=row).logits[0].double().softmax(-1).cumsum(-1)
        for t, token in enumerate(response):
            at = cumulative[len(QUERIES[i]) + t - 1]
            below = at[token - 1] if token > 0 else torch.tensor(0.0)
            assert below - 1e-6 <= drawn.uniforms[i, t] <= at[token] + 1e-6


def test_generation_runs_without_dropout_even_on_a_model_left_in_train_mode() -> None:
    expected = rows(generate(tiny_gpt2(), QUERIES, draws(), SETTINGS, TOKENIZER))
    assert rows(generate(tiny_gpt2().train(), QUERIES, draws(), SETTINGS, TOKENIZER)) == expected


def test_each_row_stops_at_its_own_length_or_with_the_end_of_text_token() -> None:
    model = tiny_gpt2()
    # The end of text made likely, so that some rows end early.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([0]), 3.0))
    queries = QUERIES * 8
    drawn = draws(len(queries))
    responses = rows(generate(model, queries, drawn, SETTINGS, TOKENIZER))
    ended_early = 0
    for response, length in zip(responses, drawn.lengths.tolist(), strict=True):
        assert 0 not in response[:-1]
        assert len(response) == length or (len(response) < length and response[-1] == 0)
        ended_early += len(response) < length
    assert 0 < ended_early < len(queries)


def test_a_response_holds_no_token_of_its_query_when_the_end_of_text_comes_first() -> None:
    model = tiny_gpt2()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([0]), 99.0))
    samples = generate(model, QUERIES, draws(), SETTINGS, TOKENIZER)
    assert rows(samples) == [[0]] * len(QUERIES)
    assert decode_responses(TOKENIZER, samples) == [""] * len(QUERIES)


def test_draws_depend_on_seed_and_step_alone_and_lengths_cover_their_range() -> None:
    one, again = Draws.of(SETTINGS, 500, seed=3, step=7), Draws.of(SETTINGS, 500, seed=3, step=7)
    assert torch.equal(one.uniforms, again.uniforms)
    assert torch.equal(one.lengths, again.lengths)
    assert set(one.lengths.tolist()) == set(range(4, 17))
    assert not torch.equal(one.uniforms, Draws.of(SETTINGS, 500, seed=3, step=8).uniforms)


def test_sampling_by_inversion_hits_each_token_in_proportion_to_its_probability() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(1000, 4)
    uniforms = (torch.arange(1000) + 0.5) / 1000
    counts = sample_tokens(logits, uniforms, GenerationSettings()).bincount(minlength=4)
    assert counts.tolist() == [500, 250, 125, 125]


def test_top_k_and_temperature_change_what_can_be_sampled() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1000, 4)
    uniforms = (torch.arange(1000) + 0.5) / 1000
    counts = sample_tokens(logits, uniforms, GenerationSettings(top_k=2)).bincount(minlength=4)
    assert counts.tolist() == [571, 429, 0, 0]
    counts = sample_tokens(logits, uniforms, GenerationSettings(temperature=0.5)).bincount(minlength=4)
    assert counts.tolist() == [533, 300, 134, 33]  # p^2 / sum(p^2) = 16, 9, 4, 1 thirtieths


class LengthRewarder:
    """Rewards a completion with the length of its text; each chunk's future is set when it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[str]]] = []

    def submit_components(self, prompts: Any, responses: Any) -> "Future[Scores]":
        self.asked.append((list(prompts), list(responses)))
        lengths = [float(len(response)) for response in responses]
        future: Future[Scores] = Future()
        future.set_result(Scores(lengths, {"length": lengths}))
        return future


def stepper(**sampling: Any) -> PPOStepper:
    policy = Policy(add_lora(tiny_gpt2(), LoraSettings()))
    return PPOStepper(policy, None, PPOHyperparameters(batch_size=4, mini_batch_size=2), sampling=Sampling(**sampling))


def test_scores_belong_to_their_own_responses_across_chunks() -> None:
    prompts = Prompts(QUERIES, TOKENIZER.batch_decode(QUERIES))
    rewarder = LengthRewarder()
    collected = collect(stepper(), TOKENIZER, prompts, draws(), SETTINGS, rewarder)
    assert [len(asked[0]) for asked in rewarder.asked] == [2, 2, 1]
    assert collected.responses == [text for _, responses in rewarder.asked for text in responses]
    assert collected.rollout.scores.tolist() == [float(len(text)) for text in collected.responses]
    assert collected.components == {"length": collected.rollout.scores.tolist()}
    assert decode_responses(TOKENIZER, collected.rollout.samples) == collected.responses


def test_the_kl_is_zero_before_the_first_update() -> None:
    prompts = Prompts(QUERIES, TOKENIZER.batch_decode(QUERIES))
    rollout = collect(stepper(), TOKENIZER, prompts, draws(), SETTINGS, LengthRewarder()).rollout
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_a_reward_that_fails_fails_the_step() -> None:
    class Failing:
        def submit_components(self, prompts: Any, responses: Any) -> "Future[Scores]":
            future: Future[Scores] = Future()
            future.set_exception(ConnectionError("gone"))
            return future

    with pytest.raises(ConnectionError, match="gone"):
        collect(stepper(), TOKENIZER, Prompts(QUERIES, ["x"] * 5), draws(), SETTINGS, Failing())
