import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.policy.samples import EvaluatedSamples, Samples
from plaudit.ppo.distributions import pack, unpack

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=6)


def rows_of(samples: Samples) -> list[tuple[list[int], list[int]]]:
    return [
        (q[qm].tolist(), r[rm].tolist())
        for q, qm, r, rm in zip(samples.query_ids, samples.query_mask, samples.response_ids, samples.mask, strict=True)
    ]


def test_queries_end_and_responses_begin_at_the_same_column() -> None:
    samples = Samples.from_lists([[1, 2, 3], [4]], [[5], [6, 7]], pad_token_id=0)
    assert samples.query_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert samples.query_mask.tolist() == [[True, True, True], [False, False, True]]
    assert samples.response_ids.tolist() == [[5, 0], [6, 7]]
    assert samples.mask.tolist() == [[True, False], [True, True]]
    assert samples.query_lengths.tolist() == [3, 1]
    assert samples.response_lengths.tolist() == [1, 2]


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6), st.data())
def test_selecting_keeps_every_token_and_no_column_that_nobody_needs(
    rows: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    queries, responses = zip(*rows, strict=True)
    samples = Samples.from_lists(queries, responses, pad_token_id=0)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    selected = samples.select(chosen)
    assert rows_of(selected) == [rows[i] for i in chosen]
    assert selected.query_mask.any(0).all()
    assert selected.mask.any(0).all()


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=7), st.integers(1, 4))
def test_chunks_put_together_again_are_the_whole(rows: list[tuple[list[int], list[int]]], size: int) -> None:
    queries, responses = zip(*rows, strict=True)
    samples = Samples.from_lists(queries, responses, pad_token_id=0)
    chunks = list(samples.chunks(size))
    assert all(len(chunk) <= size for chunk in chunks)
    assert rows_of(Samples.concatenate(chunks)) == rows


def test_an_empty_query_or_response_is_named() -> None:
    with pytest.raises(ValueError, match="response 1 must be a list of at least one token"):
        Samples.from_lists([[1], [2]], [[3], []], pad_token_id=0)
    with pytest.raises(ValueError, match="query 0 must be"):
        Samples.from_lists([[], [2]], [[3], [4]], pad_token_id=0)
    with pytest.raises(ValueError, match="2 queries and 1 responses"):
        Samples.from_lists([[1], [2]], [[3]], pad_token_id=0)


def test_evaluations_of_chunks_line_up_by_token_and_scores_make_them_a_rollout() -> None:
    def evaluation(samples: Samples) -> EvaluatedSamples:
        tensors = samples.response_ids.float()
        support = pack(torch.nn.functional.one_hot(samples.response_ids, 9).bool())
        return EvaluatedSamples(
            samples=samples, logprobs=tensors, values=tensors, ref_logprobs=tensors, support=support
        )

    parts = [
        Samples.from_lists([[1]], [[5, 6, 7]], pad_token_id=0),
        Samples.from_lists([[1, 2]], [[8]], pad_token_id=0),
    ]
    whole = EvaluatedSamples.concatenate([evaluation(part) for part in parts])
    assert whole.logprobs.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert whole.full_kl is None
    assert whole.support is not None
    assert unpack(whole.support, 9)[1, 1].all(), (
        "padding must leave some token to choose from, or its log-probability is NaN"
    )
    assert whole.with_scores(torch.tensor([1.0, 2.0])).scores.tolist() == [1.0, 2.0]
