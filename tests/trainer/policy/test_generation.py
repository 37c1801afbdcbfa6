"""Sampling: tokens come from the policy that is scored, and a sample does not depend on its company."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from harness.tiny_models import ARCHITECTURES, tiny_gpt2, tiny_tokenizer
from plaudit.errors import ConfigError
from plaudit.learner.rollout import sampler
from plaudit.policy import static_generation
from plaudit.policy.adapters import add_lora
from plaudit.policy.generation import Draws, decode_responses, generate, sample_tokens
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.policy.static_generation import Decoder, StaticGenerator, supports
from plaudit.settings.policy import GenerationSettings, LoraSettings

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


# Defect 5: rollouts ran in train mode, so that dropout drew tokens from another policy than the one scored.
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


# Defect 13: `response[-gen_len:]` took tokens of the query when the end of text came early.
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


def eager_to_end(model: Any) -> Any:
    """The model with the end of text made likely, so that some rows end early."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features).index_fill(0, torch.tensor([0]), 2.0))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampling", [{}, {"top_k": 20, "temperature": 0.7}])
def test_fixed_shapes_give_the_same_samples(architecture: str, sampling: dict[str, Any]) -> None:
    model = eager_to_end(ARCHITECTURES[architecture]())
    settings = GenerationSettings(min_new_tokens=4, max_new_tokens=24, **sampling)
    static = StaticGenerator(model, settings, TOKENIZER)
    for step in range(3):  # the second and third time into a used cache
        drawn = Draws.of(settings, len(QUERIES), seed=2, step=step)
        expected = generate(model, QUERIES, drawn, settings, TOKENIZER)
        assert rows(static(QUERIES, drawn)) == rows(expected)


def test_fixed_shapes_follow_weights_that_an_optimizer_moves() -> None:
    model = tiny_gpt2()
    static = StaticGenerator(model, SETTINGS, TOKENIZER)
    before = rows(static(QUERIES, draws()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    after = rows(static(QUERIES, draws()))
    assert after == rows(generate(model, QUERIES, draws(), SETTINGS, TOKENIZER))
    assert after != before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_of_fixed_shape_reads_nothing_back_to_the_host(architecture: str) -> None:
    # A recorded graph can't. Tensors on the meta device have no data, so that whoever reads some fails here as well.
    model = ARCHITECTURES[architecture]().to("meta")
    samples = Samples.from_lists(QUERIES, [[0]] * len(QUERIES), 0, "meta")
    decoder = Decoder(model, SETTINGS, len(QUERIES), 8, ends=[0])
    decoder.prefill(samples, draws())
    decoder.advance()


def test_queries_of_any_width_share_one_cache_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    class Counted(Decoder):
        def __init__(self, model: Any, settings: GenerationSettings, rows: int, width: int, **named: Any) -> None:
            made.append((rows, width))
            super().__init__(model, settings, rows, width, **named)

    monkeypatch.setattr(static_generation, "Decoder", Counted)
    model = tiny_gpt2()
    static = StaticGenerator(model, SETTINGS, TOKENIZER)
    for queries in (QUERIES, [[7] * 20, *QUERIES[1:]], QUERIES, QUERIES[:2]):
        drawn = draws().rows(0, len(queries))
        assert rows(static(queries, drawn)) == rows(generate(model, queries, drawn, SETTINGS, TOKENIZER))
    assert made == [(5, 8), (5, 24), (2, 8)], "a wider query makes a wider cache, and a narrower one none"


def test_a_model_that_does_not_generate_with_fixed_shapes_is_refused_by_name() -> None:
    alibi = FalconForCausalLM(
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    )
    for model in (tiny_gpt2(attn_implementation="eager"), alibi.eval()):
        policy = Policy(add_lora(model, LoraSettings()))
        with pytest.raises(ConfigError, match=f"static_cache=True: {type(model).__name__}"):
            sampler(policy, dataclasses.replace(SETTINGS, static_cache=True), TOKENIZER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fixed_shapes_are_supported_in_half_precision(architecture: str) -> None:
    # Rotary positions leave keys in fp32 where values are bf16.
    policy = Policy(add_lora(ARCHITECTURES[architecture](), LoraSettings()), autocast=torch.bfloat16)
    with policy.generating():
        assert supports(policy.language_model)
        static = StaticGenerator(policy.language_model, SETTINGS, TOKENIZER)(QUERIES, draws())
        assert rows(static) == rows(generate(policy.language_model, QUERIES, draws(), SETTINGS, TOKENIZER))


def test_fixed_shapes_that_give_other_logits_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    prefill = Decoder.prefill

    def one_position_late(self: Decoder, samples: Samples, draws: Draws) -> None:
        prefill(self, samples, draws)
        self._position.add_(9)

    monkeypatch.setattr(Decoder, "prefill", one_position_late)
    assert not supports(model)
