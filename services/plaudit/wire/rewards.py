"""The reward protocol: what travels between the trainer and a reward service. Pydantic and the standard library only.

Both sides validate with these models, so a malformed request or answer is caught where it crosses the wire and nothing
behind it needs to check again.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

REWARDS_PATH = "/v1/rewards"
MODEL_PATH = "/v1/model"
LIVEZ_PATH = "/livez"
READYZ_PATH = "/readyz"
REQUEST_ID_HEADER = "plaudit-request-id"
"""A client that sends this header gets its value back as `request_id` in the body: proof that the answer is its own."""
MAX_REQUEST_ID_CHARS = 128
PROBLEM_CONTENT_TYPE = "application/problem+json"

MAX_ITEMS_PER_REQUEST = 1024
"""Upper bound on items in one request; a service may be configured lower and says so in `/v1/model`."""
MAX_TEXT_CHARS = 1_000_000
"""Upper bound on the characters of one prompt or response."""
MAX_MESSAGES = 1024
"""Upper bound on the messages of one conversation."""
MAX_ROLE_CHARS = 64

Join = Literal["concat", "pair"]
"""How the service joins prompt and response: one string, or the tokenizer's own pair encoding."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatMessage(_Message):
    """One turn of a conversation, as chat templates take it."""

    role: Annotated[str, Field(min_length=1, max_length=MAX_ROLE_CHARS, examples=["user"])]
    content: Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=["How was the film?"])]


Conversation = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class RewardItem(_Message):
    """One completion to judge. Prompt and response travel apart; the service joins them as its model wants."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=["This movie"])] | Conversation
    """A plain text, or the messages that the response answers. The response is then the assistant's next turn."""
    response: Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=[" was wonderful."])]
    fields: dict[str, JsonValue] = {}
    """Further columns of the prompt's row, such as the right answer, for a judge that asks for them."""


class RewardRequest(_Message):
    """`POST /v1/rewards`: items in, one reward for each out, in the same order."""

    items: Annotated[list[RewardItem], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]
    label: Annotated[str | None, Field(examples=["POSITIVE"])] = None
    """Which label's raw logit is the reward. May be left out when the model has one logit or the service a default."""


class RewardResponse(_Message):
    """Rewards in request order. `revision` is a content hash of the model that made them."""

    rewards: list[FiniteFloat]
    model: str
    revision: str
    label: str | None = None
    truncated: list[int] = []
    """Indices of items whose text was cut to the model's length."""
    request_id: str | None = None
    """What the request's `Plaudit-Request-Id` header said; left out when there was none, as older clients expect."""


class Limits(_Message):
    """What one request may hold."""

    max_items: int
    max_text_chars: int
    max_body_bytes: int
    max_tokens: int
    """Longest token sequence the model sees; longer texts are truncated and reported."""


class ModelInfo(_Message):
    """`GET /v1/model`."""

    id: str
    revision: str
    labels: list[str]
    default_label: str | None = None
    join: Join = "concat"
    dtype: str = "fp32"
    """The number format that the model computes in."""
    limits: Limits
    request_id: str | None = None
    """As in `RewardResponse`. A service that leaves it out is older than request ids."""


class Problem(BaseModel):
    """An RFC 9457 problem document. `type` is for programs, `detail` for people; `item` is the index at fault."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    title: str
    status: int
    detail: str
    item: int | None = None
    labels: list[str] | None = None
    """With `unknown-label` and `label-required`: the labels there are."""


def problem_type(name: str) -> str:
    """The `type` URI of a problem, for example `urn:plaudit:problem:unknown-label`."""
    return f"urn:plaudit:problem:{name}"


FINAL_PROBLEMS = frozenset(map(problem_type, ("scoring-failed", "non-finite-score", "internal-error")))
"""Failures of the service (5xx) that come again with the same request: another try is no use."""
