"""The reward protocol: what travels between the trainer and a reward service. Pydantic and the standard library only.

Both sides validate with these models, so a malformed request or answer is caught where it crosses the wire and nothing
behind it needs to check again.
"""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, PlainValidator

REWARDS_PATH = "/v1/rewards"
MODEL_PATH = "/v1/model"
LIVEZ_PATH = "/livez"
READYZ_PATH = "/readyz"
REQUEST_ID_HEADER = "plaudit-request-id"
"""A client that sends this header gets its value back as `request_id` in the body: proof that the answer is its own."""
MAX_REQUEST_ID_CHARS = 128
WIRE_VERSION = 2
"""1: texts. 2: conversations as prompts, and a row's fields."""
WIRE_HEADER = "plaudit-wire"
"""A client that sends this header, with the version that it speaks, is told the service's in `ModelInfo`."""
PROBLEM_CONTENT_TYPE = "application/problem+json"

MAX_ITEMS_PER_REQUEST = 1024
"""Upper bound on items in one request; a service may be configured lower and says so in `/v1/model`."""
MAX_TEXT_CHARS = 1_000_000
"""Upper bound on the characters of one prompt (of all its messages together), one response, or one item's fields."""
MAX_MESSAGES = 1024
"""Upper bound on the messages of one conversation."""
MAX_ROLE_CHARS = 64
MAX_FIELDS = 64
"""Upper bound on the fields of one item."""
MAX_FIELD_NAME_CHARS = 128
MAX_FIELD_VALUES = 4096
"""Upper bound on the values and keys that the fields of one item hold, counted through lists and objects."""
MAX_FIELD_DEPTH = 16
"""Upper bound on the lists and objects inside each other in one field."""
MAX_VALUES_PER_REQUEST = 16 * MAX_ITEMS_PER_REQUEST + 2048
"""Upper bound on the values and keys of a whole request. A plain item has 5, each message adds 5."""

Join = Literal["concat", "pair", "chat"]
"""How the service joins prompt and response: one string, the tokenizer's own pair encoding, or its chat template."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatMessage(_Message):
    """One turn of a conversation, as chat templates take it."""

    role: Annotated[str, Field(min_length=1, max_length=MAX_ROLE_CHARS, examples=["user"])]
    content: Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=["How was the film?"])]


def _within_one_text(messages: list[ChatMessage]) -> list[ChatMessage]:
    chars = sum(len(message.content) for message in messages)
    if chars > MAX_TEXT_CHARS:
        raise ValueError(f"the messages have {chars} characters together; at most {MAX_TEXT_CHARS} are taken")
    return messages


Conversation = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_within_one_text)
]


def checked_fields(fields: object) -> dict[str, JsonValue]:
    """The fields of one item, if they are JSON values within the bounds above. Raises `ValueError` that says why not.

    Walked here rather than by pydantic, whose check of a JSON value takes several times as long.
    """
    if not isinstance(fields, dict):
        raise ValueError("fields must be an object")
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"there are {len(fields)} fields; at most {MAX_FIELDS} are taken")
    values = chars = 0
    for name, field in fields.items():
        chars += len(_field_name(name))
        level: list[object] = [field]
        for _ in range(MAX_FIELD_DEPTH + 1):
            below: list[object] = []
            values += len(level)
            if values > MAX_FIELD_VALUES:
                raise ValueError(f"the fields hold more than {MAX_FIELD_VALUES} values and keys")
            for value in level:
                if isinstance(value, str):
                    chars += _chars_of(name, value)
                elif isinstance(value, list):
                    below += value
                elif isinstance(value, dict):
                    below += value.keys()
                    below += value.values()
                    if not all(isinstance(key, str) for key in value):
                        raise ValueError(f"field {name!r} holds an object with a key that is no text")
                elif isinstance(value, float):
                    if not math.isfinite(value):
                        raise ValueError(f"field {name!r} holds {value}, which is no number in JSON")
                elif value is not None and not isinstance(value, bool | int):
                    raise ValueError(f"field {name!r} holds a {type(value).__name__}, which is no JSON value")
            level = below
            if not level:
                break
        else:
            raise ValueError(f"field {name!r} is nested more than {MAX_FIELD_DEPTH} deep")
        if chars > MAX_TEXT_CHARS:
            raise ValueError(f"the fields hold more than {MAX_TEXT_CHARS} characters")
    return fields


def _field_name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_FIELD_NAME_CHARS:
        raise ValueError(f"a field's name must be a text of 1 to {MAX_FIELD_NAME_CHARS} characters")
    _chars_of(name, name)
    return name


def _chars_of(name: str, value: str) -> int:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {name!r:.80} holds half a surrogate pair, which is no text") from None
    return len(value)


Fields = Annotated[
    dict[str, JsonValue],
    PlainValidator(
        checked_fields, json_schema_input_type=Annotated[dict[str, JsonValue], Field(max_length=MAX_FIELDS)]
    ),
]


class RewardItem(_Message):
    """One completion to judge. Prompt and response travel apart; the service joins them as its model wants."""

    prompt: Annotated[
        Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=["This movie"])] | Conversation,
        Field(union_mode="left_to_right"),
    ]
    """A plain text, or the messages that the response answers. The response is then the assistant's next turn."""
    response: Annotated[str, Field(max_length=MAX_TEXT_CHARS, examples=[" was wonderful."])]
    fields: Fields = Field(default_factory=dict)
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
    wire: int = 1
    """The version of this protocol that the service speaks; told to clients that send `Plaudit-Wire`."""
    fields: list[str] = Field(default_factory=list)
    """Names of the fields that the service needs of every item."""
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
