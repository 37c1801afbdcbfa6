"""The judge of hostile connections finds what is wrong, and every kind of request is sent."""

import json
import random

import pytest

from harness.load import hostile_requests
from harness.load.hostile_framing import Seen, wrong_with
from harness.load.hostile_requests import HIDDEN, Exchange, Meaning, exchange, ordinary

REWARDS = {"first": 1.0, "second": 2.0, "third": 3.0}
NAMED = {"before": "first", "hostile": "second", "behind": "third"}


def answer(request_id: str | None, status: int = 200, *, reward: float | None = None) -> bytes:
    if request_id is None:
        return b"HTTP/1.1 %d No\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}" % status
    value = REWARDS.get(NAMED.get(request_id, ""), 0.0) if reward is None else reward
    body = json.dumps({"rewards": [value], "request_id": request_id}).encode()
    head = b"HTTP/1.1 %d OK\r\nx-request-id: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (status, request_id.encode(), len(body)) + body


def wanted(meaning: Meaning, *, closes: bool = False) -> Exchange:
    return Exchange("a kind", [], meaning, NAMED, frozenset({200}), closes)


ALL = [answer("before"), answer("hostile"), answer("behind")]


@pytest.mark.parametrize(
    ("meaning", "answers"),
    [
        (Meaning.SERVED, ALL),
        (Meaning.EITHER, ALL),
        (Meaning.EITHER, [ALL[0], answer(None, 400)]),
        (Meaning.REFUSED, [ALL[0], answer(None, 501)]),
        (Meaning.UNFINISHED, [ALL[0]]),
    ],
)
def test_what_the_meaning_allows_is_right(meaning: Meaning, answers: list[bytes]) -> None:
    assert wrong_with(wanted(meaning), Seen(bytearray(b"".join(answers))), REWARDS) is None


@pytest.mark.parametrize(
    ("meaning", "answers", "why"),
    [
        (Meaning.REFUSED, ALL, "where REFUSED was due"),
        (Meaning.SERVED, [ALL[0], answer(None, 400)], "where SERVED was due"),
        (Meaning.SERVED, ALL[:2], "where SERVED was due"),
        (Meaning.REFUSED, [answer(None, 400)], "where REFUSED was due"),
        (Meaning.UNFINISHED, ALL, "where UNFINISHED was due"),
        (Meaning.EITHER, [*ALL, answer("hidden")], "the hidden request was answered"),
        (Meaning.EITHER, [*ALL, ALL[1]], "answered more than once"),
        (Meaning.REFUSED, [ALL[0], answer(None, 400), answer(None, 400)], "answered more than once"),
        (Meaning.EITHER, [ALL[0], answer(None, 400), ALL[2]], "refused, and yet not over"),
        (Meaning.EITHER, [ALL[0], answer("hostile", 500)], "status 500"),
        (Meaning.EITHER, [ALL[0], answer("hostile", reward=3.0), ALL[2]], "hostile got"),
        (Meaning.EITHER, [*ALL, b"more"], "b'more' after"),
    ],
)
def test_what_it_does_not_allow_is_wrong(meaning: Meaning, answers: list[bytes], why: str) -> None:
    assert why in str(wrong_with(wanted(meaning), Seen(bytearray(b"".join(answers))), REWARDS))


def test_a_connection_that_does_not_end_is_wrong() -> None:
    seen = Seen(bytearray(b"".join(ALL)), hung=True)
    assert "no end" in str(wrong_with(wanted(Meaning.SERVED), seen, REWARDS))


def test_the_same_seed_makes_the_same_bytes() -> None:
    first, again = ([exchange(draw, list(REWARDS)) for _ in range(50)] for draw in (random.Random(3), random.Random(3)))
    assert first == again


def test_every_part_of_a_request_is_sent_some_time() -> None:
    draw = random.Random(0)
    kinds = " ".join(exchange(draw, list(REWARDS)).kind for _ in range(20_000))
    for table in ("LINES", "VERSIONS", "HOSTS", "FRAMINGS", "FIELDS", "LINE_ENDS"):
        for feature in getattr(hostile_requests, table):
            assert repr(feature.sent[:60]) in kinds, (table, feature)
    assert all(name in kinds for name, _, _ in hostile_requests.CHUNKS)


def test_ordinary_requests_surround_the_hostile_one() -> None:
    draw = random.Random(0)
    for _ in range(200):
        made = exchange(draw, list(REWARDS))
        sent = b"".join(made.pieces)
        if "before" in made.texts:
            assert sent.startswith(ordinary(made.texts["before"], "before"))
        assert not made.garbled or HIDDEN not in sent
