"""The simulated engine beside the real one, and its rules by hand."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from plaudit.reward_service.engine import batching
from plaudit.reward_service.problems import ProblemError
from plaudit.sizing.engine import Engine, Job


def test_a_batch_is_filled_to_its_tokens_and_no_further() -> None:
    engine = Engine(batch_tokens=100, max_queue_tokens=1000)
    job = Job(0, [40, 40, 40])
    engine.add(job)
    assert engine.take() == ([(job, 2)], 80, [])
    assert engine.take() == ([(job, 1)], 40, [])
    assert engine.take() == ([], 0, [])


def test_a_text_larger_than_a_batch_has_one_of_its_own() -> None:
    engine = Engine(batch_tokens=100, max_queue_tokens=1000)
    job = Job(0, [500, 10])
    engine.add(job)
    assert engine.take()[1] == 500


def test_a_job_is_done_with_its_last_text() -> None:
    engine = Engine(batch_tokens=100, max_queue_tokens=1000)
    job = Job(0, [60, 60])
    engine.add(job)
    first, second = engine.take(), engine.take()
    assert engine.finish(first[0], first[1], 1.0) == []
    assert engine.queued_tokens == 120
    assert engine.finish(second[0], second[1], 1.0) == [job]
    assert (engine.queued_tokens, engine.queued_texts, engine.tokens_per_s) == (0, 0, 60)


def test_texts_of_a_client_that_has_gone_are_dropped() -> None:
    engine = Engine(batch_tokens=100, max_queue_tokens=1000)
    gone, stays = Job(0, [60, 60]), Job(1, [60])
    engine.add(gone)
    engine.add(stays)
    gone.abandoned = True
    assert engine.take() == ([(stays, 1)], 60, [gone])
    assert engine.queued_tokens == 60


class FakeScorer:
    """A text of four characters a token, and two tokens around it. Remembers its batches."""

    id, revision, labels, max_tokens, dtype, packed, replicas = "fake", "0", ("one",), 10_000, "fp32", True, 1

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def encode(self, texts: Sequence[batching.Text]) -> list[batching.Encoded]:
        return [batching.Encoded(range(2 + sum(map(len, batching.parts_of(text))) // 4)) for text in texts]

    def score(self, batch: Sequence[batching.Encoded], replica: int) -> list[batching.Logits]:
        self.batches.append([len(encoded.ids) for encoded in batch])
        return [(0.0,)] * len(batch)


def texts_of(tokens: Sequence[int]) -> list[batching.Plain]:
    return [("x" * (4 * (count - 2)), None) for count in tokens]


@pytest.mark.parametrize("seed", range(10))
def test_the_real_engine_makes_the_same_batches_and_refusals(seed: int) -> None:
    """Callers send at random, and batches run at random between them."""
    draw = random.Random(seed)
    bound = draw.choice([600, 5000])
    scorer = FakeScorer()
    ours = Engine(batch_tokens=100, max_queue_tokens=bound)
    ran: list[list[int]] = []
    begun: dict[Job, int] = {}

    def run_one_of_ours() -> None:
        batch, tokens, _ = ours.take()
        if batch:
            ran.append([])
        for job, count in batch:
            first = begun.get(job, 0)
            ran[-1] += map(int, job.tokens[first : first + count])
            begun[job] = first + count
        ours.finish(batch, tokens, 1.0)

    async def both() -> None:
        real = batching.Engine(scorer, batch_tokens=100, max_queue_tokens=bound)

        def run_one_of_theirs() -> None:
            while real._arrived:
                real._tokenize_parts(real._take_arrived())
            real._run(*real._waiting.take(100), 0)

        refused = 0
        for _ in range(200):
            if draw.random() < 0.4:
                caller, tokens = draw.randrange(4), [draw.randint(2, 60) for _ in range(draw.choice([1, 2, 30]))]
                job = Job(caller, tokens)
                if ours.admits(job):
                    ours.add(job)
                    real.submit(texts_of(tokens), caller=str(caller))
                else:
                    refused += 1
                    with pytest.raises(ProblemError, match="tokens are waiting"):
                        real.submit(texts_of(tokens), caller=str(caller))
            else:
                run_one_of_ours()
                run_one_of_theirs()
            assert real.queued_tokens == ours.queued_tokens
        assert refused or bound == 5000

    asyncio.run(both())
    assert ran
    assert scorer.batches == ran
