"""The engine with a scorer that a test can hold, fail and watch."""

import asyncio
import gc
import itertools
import time
import weakref
from collections.abc import Callable, Sequence

import pytest

from harness.scorers import FakeScorer
from plaudit.reward_service.engine.batching import (
    SLICE_CHARS,
    Encoded,
    Engine,
    Job,
    Logits,
    Scored,
    TemporaryOutOfMemory,
    Text,
    parts_of,
)
from plaudit.reward_service.problems import ProblemError


def texts(*words: str) -> list[tuple[str, None]]:
    return [(word, None) for word in words]


async def tokenised(*jobs: Job) -> None:
    """Wait until every text of these waits for the model."""
    await until(lambda: all(len(job.items) == job.count for job in jobs))


def batches_of(lengths: list[int], budget: int, make_engine: Callable[..., Engine], *, packed: bool) -> list[list[int]]:
    """The batches in which texts of these lengths, which all wait, reach the model."""
    scorer = FakeScorer(packed=packed, held=True)

    async def run() -> None:
        engine = make_engine(scorer, batch_tokens=budget)
        plug = engine.submit(texts("plug"))
        await asyncio.to_thread(scorer.entered.acquire)
        job = engine.submit(texts(*("a" * length for length in lengths)))
        await tokenised(job)
        scorer.open()
        await asyncio.gather(plug.future, job.future)

    asyncio.run(run())
    return scorer.batches[1:]


def test_a_padded_batch_is_the_length_neighbourhood_of_the_oldest(make_engine: Callable[..., Engine]) -> None:
    # 4 rows of at most 12 tokens fit a budget of 48, and 5 of 13 don't; 90 and 100 are more than the budget.
    lengths = [10, 90, 11, 100, 9, 12, 13]
    assert batches_of(lengths, 48, make_engine, packed=False) == [[9, 10, 11, 12], [90], [100], [13]]


def test_a_packed_batch_is_filled_in_order_of_arrival(make_engine: Callable[..., Engine]) -> None:
    assert batches_of([10, 90, 11, 100], 111, make_engine, packed=True) == [[10, 90, 11], [100]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_text_longer_than_the_budget_runs_alone(packed: bool, make_engine: Callable[..., Engine]) -> None:
    assert batches_of([600, 5], 512, make_engine, packed=packed) == [[600], [5]]


@pytest.mark.parametrize("packed", [True, False])
def test_abandoned_texts_are_dropped_before_the_forward_pass(packed: bool, make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=packed, held=True)

    async def run() -> None:
        engine = make_engine(scorer)
        plug = engine.submit(texts("plug"))
        await asyncio.to_thread(scorer.entered.acquire)
        gone, wanted = engine.submit(texts("a" * 5)), engine.submit(texts("a" * 6))
        await tokenised(gone, wanted)
        # Whether it is late already when it is tokenised or only afterwards, the model must not see it.
        late = engine.submit(texts("a" * 7), deadline=time.monotonic() + 0.3)
        engine.abandon(gone)
        await until(lambda: time.monotonic() > late.admitted_at + 0.4)
        scorer.open()
        await asyncio.gather(plug.future, wanted.future)
        with pytest.raises(ProblemError) as caught:
            await late.future
        assert caught.value.name == "deadline-exceeded"
        assert gone.future.cancelled()
        assert engine.queued_tokens == 0

    asyncio.run(run())
    assert scorer.batches[1:] == [[6]]


async def score(engine: Engine, *words: str) -> list[float]:
    scored = await engine.submit(texts(*words)).future
    return [row[0] for row in scored.logits]


def test_answers_come_in_request_order(make_engine: Callable[..., Engine]) -> None:
    async def run() -> list[list[float]]:
        engine = make_engine(batch_tokens=8)
        return await asyncio.gather(*(score(engine, "a" * n, "b", "c" * (n + 1)) for n in range(1, 20)))

    assert asyncio.run(run()) == [[n, 1, n + 1] for n in range(1, 20)]


def test_a_batch_forms_while_the_previous_one_runs(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True, held=True)

    async def run() -> None:
        engine = make_engine(scorer)
        first = asyncio.create_task(score(engine, "a"))
        await asyncio.to_thread(scorer.entered.acquire)
        rest = [engine.submit(texts("b" * n)) for n in range(2, 10)]
        await tokenised(*rest)
        scorer.open()
        await asyncio.gather(first, *(job.future for job in rest))

    asyncio.run(run())
    assert scorer.batches == [[1], [2, 3, 4, 5, 6, 7, 8, 9]]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread's state; the test's own timeout is the bound."""
    while not condition():  # noqa: ASYNC110 (the state belongs to a thread, which has no event to set)
        await asyncio.sleep(0.001)


def test_a_failed_batch_fails_its_own_requests_and_the_next_one_succeeds(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True, held=True)

    async def run() -> tuple[list[Scored | BaseException], list[float]]:
        engine = make_engine(scorer)
        plug = asyncio.create_task(score(engine, "plug"))
        await asyncio.to_thread(scorer.entered.acquire)
        requests = [texts("good", "better"), texts("fine", "poison", "fine"), texts("best")]
        jobs = [engine.submit(request) for request in requests]
        await tokenised(*jobs)
        scorer.open()
        await plug
        outcomes = await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)
        return outcomes, await score(engine, "after")

    (first, poisoned, last), after = asyncio.run(run())
    assert isinstance(first, Scored)
    assert [row[0] for row in first.logits] == [4, 6]
    assert isinstance(poisoned, ProblemError)
    assert (poisoned.name, poisoned.item) == ("scoring-failed", 1)
    assert isinstance(last, Scored)
    assert [row[0] for row in last.logits] == [4]
    assert after == [5]
    assert scorer.batches[1] == [4, 6, 4, 6, 4, 4], "the poisoned batch was one batch"


class Cramped(FakeScorer):
    """Has no room for long texts."""

    def score(self, batch: Sequence[Encoded], replica: int) -> list[Logits]:
        if any(len(encoded.ids) > 10 for encoded in batch):
            raise TemporaryOutOfMemory("DefaultCPUAllocator: can't allocate memory")
        return super().score(batch, replica)


def test_a_lack_of_memory_may_pass_and_says_so(make_engine: Callable[..., Engine]) -> None:
    async def run() -> ProblemError:
        with pytest.raises(ProblemError) as caught:
            await score(make_engine(Cramped()), "fine", "a" * 20)
        return caught.value

    problem = asyncio.run(run())
    assert (problem.name, problem.status, problem.item, problem.retry_after_s) == ("out-of-memory", 503, 1, 1)


def test_a_logit_that_is_not_finite_is_an_error_and_never_a_score(make_engine: Callable[..., Engine]) -> None:
    async def run() -> ProblemError:
        with pytest.raises(ProblemError) as caught:
            await score(make_engine(), "fine", "nan")
        return caught.value

    problem = asyncio.run(run())
    assert (problem.name, problem.item) == ("non-finite-score", 1)


def test_admission_is_atomic_and_room_comes_back(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=100)
        held = asyncio.create_task(score(engine, "a" * 60))
        await asyncio.to_thread(scorer.entered.acquire)
        assert engine.queued_tokens == 60
        with pytest.raises(ProblemError, match="60 tokens are waiting") as caught:
            engine.submit(texts("b" * 100, "c" * 100))
        assert caught.value.name == "queue-full"
        assert caught.value.retry_after_s == 1
        assert engine.queued_tokens == 60, "nothing of the refused request is left behind"
        scorer.open()
        await held
        assert engine.queued_tokens == 0
        assert await score(engine, "b" * 100, "c" * 100) == [100, 100]

    asyncio.run(run())


def test_a_request_larger_than_the_queue_is_admitted_when_the_queue_is_empty(
    make_engine: Callable[..., Engine],
) -> None:
    assert asyncio.run(score(make_engine(max_queue_tokens=10), "a" * 400)) == [400]


def test_retry_after_follows_the_measured_rate(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=1000)
        jobs = [engine.submit(texts("a" * 500)) for _ in range(2)]
        await until(lambda: engine.queued_tokens == 1000)
        engine.tokens_per_s = 50.0
        with pytest.raises(ProblemError) as caught:
            engine.submit(texts("b" * 1992))
        # 500 tokens too many at 50 tokens a second.
        assert caught.value.retry_after_s == 10
        scorer.open()
        await asyncio.gather(*(job.future for job in jobs))

    asyncio.run(run())


def test_a_dead_thread_fails_what_waits_and_says_why(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True, held=True)

    async def run() -> Engine:
        engine = make_engine(scorer)
        assert engine.unready() is None
        lost = asyncio.create_task(score(engine, "lost"))
        await asyncio.to_thread(scorer.entered.acquire)
        waits = engine.submit(texts("waits"))
        await tokenised(waits)
        scorer.open()
        for outcome in await asyncio.gather(lost, waits.future, return_exceptions=True):
            assert isinstance(outcome, ProblemError)
            assert outcome.name == "not-ready"
        with pytest.raises(ProblemError, match="device gone"):
            engine.submit(texts("more"))
        return engine

    engine = asyncio.run(run())
    assert "device gone" in str(engine.unready())
    assert engine.queued_tokens == 0


def test_a_draining_engine_finishes_what_it_took_and_takes_no_more(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> list[float]:
        engine = make_engine(scorer)
        accepted = asyncio.create_task(score(engine, "accepted"))
        await asyncio.to_thread(scorer.entered.acquire)
        engine.draining = True
        with pytest.raises(ProblemError) as caught:
            engine.submit(texts("late"))
        assert caught.value.status == 503
        scorer.open()
        return await accepted

    assert asyncio.run(run()) == [8]


def test_a_request_is_judged_by_the_model_that_was_there_when_it_came(make_engine: Callable[..., Engine]) -> None:
    old, new = FakeScorer(held=True), FakeScorer()
    new.revision = "sha256:new"

    async def run() -> list[tuple[str, float]]:
        engine = make_engine(old)
        jobs = [engine.submit(texts("a")), engine.submit(texts("bb"))]
        await asyncio.to_thread(old.entered.acquire)
        engine.replace(new)
        jobs.append(engine.submit(texts("ccc")))
        old.open()
        scored = [await job.future for job in jobs]
        return [(one.scorer.revision, one.logits[0][0]) for one in scored]

    assert asyncio.run(run()) == [("sha256:fake", 1), ("sha256:fake", 2), ("sha256:new", 3)]


def test_an_idle_service_lets_go_of_the_model_that_a_reload_replaced(make_engine: Callable[..., Engine]) -> None:
    async def run() -> None:
        old = FakeScorer()
        engine = make_engine(old)
        assert await score(engine, "ab") == [2]
        engine.replace(FakeScorer())
        gone = weakref.ref(old)
        del old
        await until(lambda: gc.collect() >= 0 and gone() is None)

    asyncio.run(run())


def test_a_caller_with_one_text_passes_a_caller_with_a_thousand(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True, held=True)

    async def run() -> None:
        engine = make_engine(scorer, batch_tokens=100, max_queue_tokens=1000)
        greedy = engine.submit(texts(*["a" * 50] * 1000), caller="greedy")
        await asyncio.to_thread(scorer.entered.acquire)
        await until(lambda: len(greedy.items) >= 20)
        small = engine.submit(texts("b" * 7), caller="small")
        await tokenised(small)
        scorer.open()
        await asyncio.gather(small.future, greedy.future)

    asyncio.run(run())
    assert [7 in batch for batch in scorer.batches].index(True) <= 2, "its turn comes within two passes"


def test_a_full_queue_takes_a_callers_share_and_no_more(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=1000)
        jobs = [engine.submit(texts(*["a" * 400] * 10), caller="greedy")]
        await until(lambda: engine.queued_tokens == 4000)
        jobs += [engine.submit(texts("b" * 10), caller="small") for _ in range(3)]
        with pytest.raises(ProblemError, match="tokens are waiting"):
            engine.submit(texts("a"), caller="greedy")
        with pytest.raises(ProblemError, match="tokens are waiting"):
            engine.submit(texts(*["b" * 400] * 10), caller="small")
        # Many together can't go round the bound: beside the largest caller, the queue holds no more than ever.
        for number in range(1000):
            try:
                jobs.append(engine.submit(texts("c" * 100), caller=f"one of many {number}"))
            except ProblemError:
                break
        await tokenised(*jobs)
        assert engine.queued_tokens <= 4000 + 4 * 1000, "an estimate of a quarter"
        scorer.open()
        await asyncio.gather(*(job.future for job in jobs))
        assert engine.queued_tokens == 0

    asyncio.run(run())


def test_callers_who_were_answered_take_nothing_from_the_share_of_others(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer()

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=1000)
        before = [engine.submit(texts("a"), caller=f"one of many {number}") for number in range(50)]
        await asyncio.gather(*(job.future for job in before))
        scorer.hold()
        greedy = engine.submit(texts(*["a" * 400] * 10), caller="greedy")
        # Some 300 tokens, of the 500 that are a share of two callers; of fifty-two it would be 19.
        small = engine.submit(texts("b" * 1200), caller="small")
        scorer.open()
        await greedy.future
        assert (await small.future).logits == [(1200, -1200)]

    asyncio.run(run())


def test_two_large_requests_are_served_in_turns(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True, held=True)

    async def run() -> None:
        engine = make_engine(scorer, batch_tokens=100, max_queue_tokens=100_000)
        plug = engine.submit(texts("plug"), caller="plug")
        await asyncio.to_thread(scorer.entered.acquire)
        jobs = [engine.submit(texts(*["a" * length] * 40), caller=f"{length}") for length in (100, 101)]
        await tokenised(*jobs)
        scorer.open()
        await asyncio.gather(plug.future, *(job.future for job in jobs))

    asyncio.run(run())
    assert all(len(batch) == 1 for batch in scorer.batches), "two of these texts are more than a batch"
    served = [length for [length] in scorer.batches[1:]]
    assert sorted(served) == [100] * 40 + [101] * 40
    assert max(len(list(turn)) for _, turn in itertools.groupby(served)) < 20


def test_a_request_is_tokenised_in_slices(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(packed=True)
    taken: list[int] = []
    encode = scorer.encode

    def watched(wanted: Sequence[Text]) -> list[Encoded]:
        taken.append(sum(len(part) for text in wanted for part in parts_of(text)))
        return encode(wanted)

    scorer.encode = watched  # type: ignore[assignment, method-assign]
    words = [letter * 10_000 for letter in "abcdefghijklmnopqrst"]
    assert asyncio.run(score(make_engine(scorer, batch_tokens=10**6, max_queue_tokens=10**7), *words)) == [10_000] * 20
    assert sum(taken) == 200_000
    assert max(taken) <= SLICE_CHARS


def test_what_is_not_ascii_counts_as_a_token_a_character(make_engine: Callable[..., Engine]) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer)
        plug = engine.submit(texts("plug"))
        await asyncio.to_thread(scorer.entered.acquire)
        waiting = engine.submit(texts("e\N{COMBINING ACUTE ACCENT}" * 100))
        assert waiting.tokens >= 200
        scorer.open()
        await asyncio.gather(plug.future, waiting.future)

    asyncio.run(run())
