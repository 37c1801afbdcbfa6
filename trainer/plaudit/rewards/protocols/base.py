"""The interface of a protocol: description, request and answer. It never waits and never retries."""

import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from plaudit.rewards.settings import RewardComponent
from plaudit.wire import MAX_TEXT_CHARS, Limits, ModelInfo, RewardItem, RewardResponse

SIGMOIDS_SHOW_IN = 4
Get = Callable[[str], Awaitable[bytes]]
"""Fetches a path below the endpoint's URL. Raises unless the request succeeds."""


class BrokenBody(Exception):
    """The answer was damaged in transit. A retry may succeed."""


class UnusableAnswer(Exception):
    """A complete answer that doesn't match the request."""


class NoVerdict(UnusableAnswer):
    """A judge's answer without a score. A retry may give one."""


@dataclass(frozen=True)
class Call:
    """A POST below the endpoint's URL, with a JSON body."""

    path: str
    body: bytes


class Dialect(Protocol):
    """The translation between one server protocol and `plaudit.wire`. One instance serves one endpoint."""

    name: str
    retried_statuses: frozenset[int]
    """Statuses that mean "try again" in this protocol, besides those that mean it everywhere."""
    adds_first_token: bool
    """Whether servers add the tokenizer's special tokens to every text, so that a rendered text must not begin with
    them."""
    conversations_per_request: int | None
    """Maximum number of conversations per request; None if there is no limit."""

    def __init__(self, component: RewardComponent) -> None: ...

    async def describe(self, get: Get) -> ModelInfo:
        """The model's name, revision, labels (empty if the protocol doesn't list them) and limits.

        Raises what `get` raises while the server isn't ready.
        """

    def no_conversations(self, info: ModelInfo) -> str | None:
        """Why conversations can't be sent, and what to do about it; None if they can."""

    def needs(self, info: ModelInfo) -> Sequence[str]:
        """Names of the fields that every item must have."""

    def takes(self, info: ModelInfo) -> Sequence[str]:
        """Names of optional fields, sent if a row has them."""

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The request for these items. They contain only the fields and conversations that the protocol allows."""

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The rewards in request order. Raises `BrokenBody` or `UnusableAnswer`."""


class TextsAlone(Dialect):
    """Base class of protocols that accept only texts: no conversations, no fields."""

    adds_first_token: bool = True
    conversations_per_request: int | None = None

    def no_conversations(self, info: ModelInfo) -> str | None:
        """Always a reason: this protocol has no field for messages."""
        return "its protocol has no place for messages"

    def needs(self, info: ModelInfo) -> Sequence[str]:
        """No fields."""
        return ()

    def takes(self, info: ModelInfo) -> Sequence[str]:
        """No fields."""
        return ()


def prompt_text(item: RewardItem) -> str:
    """The prompt of an item without a conversation, or whose conversation has been rendered."""
    assert isinstance(item.prompt, str)
    return item.prompt


def joined(items: Sequence[RewardItem]) -> list[str]:
    """Prompt and response joined to one text per item."""
    return [prompt_text(item) + item.response for item in items]


def to_json(value: object) -> bytes:
    """The value as JSON, in UTF-8."""
    return json.dumps(value).encode()


def from_json(body: bytes) -> Any:
    """The parsed JSON document. Raises `BrokenBody` for anything else."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise BrokenBody(f"not JSON: {error}") from error


def model_info(
    model: str, *, revision: str | None = None, labels: Sequence[str] = (), max_items: int | None = None
) -> ModelInfo:
    """The description of another server's model. Without a revision, the model's name is used."""
    limits = Limits(
        max_items=max_items or 1024, max_text_chars=MAX_TEXT_CHARS, max_body_bytes=2**31 - 1, max_tokens=2**31 - 1
    )
    return ModelInfo(id=model, revision=revision or model, labels=list(labels), limits=limits)


def response(rewards: Sequence[object], label: str | None, info: ModelInfo) -> RewardResponse:
    """The answer, checked as strictly as Plaudit's own: finite numbers, no strings, no booleans, no null."""
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise UnusableAnswer(f"{reward!r} came back as a reward; it must be a finite number")
    return RewardResponse(rewards=list(rewards), model=info.id, revision=info.revision, label=label)  # type: ignore[arg-type]


def in_index_order(entries: Any) -> list[dict[str, Any]]:
    """Entries sorted by their `index` field. The indices must be 0 to n - 1, each exactly once."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UnusableAnswer(f"a list of objects was expected, not {entries!r:.80}")
    indices = [entry.get("index") for entry in entries]
    if sorted(indices, key=str) != sorted(range(len(entries)), key=str):
        raise UnusableAnswer(f"the answer's indices are {indices}, not 0 to {len(entries) - 1}")
    return sorted(entries, key=lambda entry: entry["index"])


def logit_by_name(scores: Any, label: str | None) -> object:
    """The score of the requested label in one text's `[{"label": ..., "score": ...}, ...]`, in any order."""
    if not isinstance(scores, list) or not all(isinstance(s, dict) and "label" in s and "score" in s for s in scores):
        raise UnusableAnswer(f"labels with scores were expected, not {scores!r:.80}")
    if label is None and len(scores) == 1:
        return scores[0]["score"]
    found = [entry["score"] for entry in scores if entry["label"] == label]
    if len(found) != 1:
        raise UnusableAnswer(f"label {label!r} is not among {', '.join(str(entry['label']) for entry in scores)}")
    return found[0]


def logit_by_index(row: Any, component: RewardComponent) -> object:
    """The logit at `label_index` in one text's row. A row with a single logit needs no index."""
    if not isinstance(row, list) or not row:
        raise UnusableAnswer(f"a row of logits was expected, not {row!r:.80}")
    index = component.label_index
    if index is None and len(row) > 1:
        raise UnusableAnswer(
            f"{len(row)} logits came back and this protocol doesn't name their labels: say which one with "
            "--reward.label-index"
        )
    if index is not None and not 0 <= index < len(row):
        raise UnusableAnswer(f"reward.label_index={index}, but {len(row)} logits came back")
    return row[index or 0]


class ProbabilityCheck:
    """Raises `UnusableAnswer` if an answer contains probabilities instead of raw logits.

    A row of two or more non-negative numbers that sums to one is a softmax. Sigmoids can only be recognised by all
    numbers lying between 0 and 1. This is checked once, on the first answer with at least `SIGMOIDS_SHOW_IN` texts, so
    that a run is refused at its start and not later. It is not checked if the protocol can't request logits
    (`asked=False`), because a model's own scores may lie in that range.
    """

    def __init__(self, component: RewardComponent, *, asked: bool = True) -> None:
        self._accepts = component.accept_probabilities
        self._look_for_sigmoids = asked

    def __call__(self, rows: Sequence[Sequence[object]]) -> None:
        """Check one answer's rows of scores, one row a text."""
        numbers = [[n for n in row if isinstance(n, int | float)] for row in rows]
        if self._accepts or not numbers:
            return
        if all(len(row) > 1 and min(row) >= 0 and abs(sum(row) - 1) < 1e-3 for row in numbers):
            raise UnusableAnswer(
                "probabilities came back, and raw logits are wanted; --reward.accept-probabilities takes them"
            )
        if self._look_for_sigmoids and len(numbers) >= SIGMOIDS_SHOW_IN:
            self._look_for_sigmoids = False
            if all(0 <= number <= 1 for row in numbers for number in row):
                raise UnusableAnswer(
                    "every score lies between 0 and 1, as probabilities do, though raw logits were asked for; if the "
                    "model's scores are like that, --reward.accept-probabilities takes them"
                )
