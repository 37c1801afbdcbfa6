"""Rollouts: every score belongs to its own response, and what fails fails the step."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from harness.tiny_models import tiny_gpt2, tiny_llama2_tokenizer, tiny_tokenizer
from plaudit.data.prompts import Prompts
from plaudit.learner.rollout import collect_rollout
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.adapters import add_lora
from plaudit.policy.generation import Draws, decode_responses
from plaudit.policy.model import Policy
from plaudit.policy.texts import prompt_texts
from plaudit.rewards import Scores
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOHyperparameters

QUERIES = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
SETTINGS = GenerationSettings(min_new_tokens=4, max_new_tokens=16, batch_size=2)
TOKENIZER = tiny_tokenizer()


def draws(count: int = len(QUERIES), settings: GenerationSettings = SETTINGS) -> Draws:
    return Draws.of(settings, count, seed=1, step=0)


class LengthRewarder:
    """Rewards a completion with the length of its text; each chunk's future is set when it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[str]]] = []

    def submit_components(self, prompts: Any, responses: Any, fields: Any = None) -> "Future[Scores]":
        self.asked.append((list(prompts), list(responses)))
        lengths = [float(len(response)) for response in responses]
        future: Future[Scores] = Future()
        future.set_result(Scores(lengths, {"length": lengths}))
        return future


def stepper() -> PPOStepper:
    policy = Policy(add_lora(tiny_gpt2(), LoraSettings()))
    return PPOStepper(policy, None, PPOHyperparameters(batch_size=4, mini_batch_size=2))


def test_scores_belong_to_their_own_responses_across_chunks() -> None:
    prompts = Prompts(QUERIES, TOKENIZER.batch_decode(QUERIES))
    rewarder = LengthRewarder()
    collected = collect_rollout(stepper(), TOKENIZER, prompts, draws(), SETTINGS, rewarder)
    assert [len(asked[0]) for asked in rewarder.asked] == [2, 2, 1]
    assert collected.responses == [text for _, responses in rewarder.asked for text in responses]
    assert collected.rollout.scores.tolist() == [float(len(text)) for text in collected.responses]
    assert collected.components == {"length": collected.rollout.scores.tolist()}
    assert decode_responses(TOKENIZER, collected.rollout.samples) == collected.responses


def test_the_judge_gets_what_was_written_to_the_space_between_prompt_and_response() -> None:
    tokenizer: Any = tiny_llama2_tokenizer()
    texts = ["This movie was", "A great story about", "The acting", "I would", "The music of the film"]
    queries = tokenizer(texts)["input_ids"]
    policy = Policy(add_lora(tiny_gpt2(vocab_size=len(tokenizer), eos_token_id=2), LoraSettings()))
    one = PPOStepper(policy, None, PPOHyperparameters(batch_size=4, mini_batch_size=2))
    rewarder = LengthRewarder()
    prompts = Prompts(queries, prompt_texts(tokenizer, queries))
    samples = collect_rollout(one, tokenizer, prompts, draws(), SETTINGS, rewarder).rollout.samples
    asked = [prompt + response for chunk in rewarder.asked for prompt, response in zip(*chunk, strict=True)]
    written = [
        [*query, *row[:length]]
        for query, row, length in zip(queries, samples.response_ids.tolist(), samples.lengths[1].tolist(), strict=True)
    ]
    assert asked == tokenizer.batch_decode(written, skip_special_tokens=True)
    assert prompts.texts == texts


def test_the_kl_is_zero_before_the_first_update() -> None:
    prompts = Prompts(QUERIES, TOKENIZER.batch_decode(QUERIES))
    rollout = collect_rollout(stepper(), TOKENIZER, prompts, draws(), SETTINGS, LengthRewarder()).rollout
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_a_reward_that_fails_fails_the_step() -> None:
    class Failing:
        def submit_components(self, prompts: Any, responses: Any, fields: Any = None) -> "Future[Scores]":
            future: Future[Scores] = Future()
            future.set_exception(ConnectionError("gone"))
            return future

    with pytest.raises(ConnectionError, match="gone"):
        collect_rollout(stepper(), TOKENIZER, Prompts(QUERIES, ["x"] * 5), draws(), SETTINGS, Failing())
