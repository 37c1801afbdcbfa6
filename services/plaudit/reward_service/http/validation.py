"""Is a body a request for rewards? What is wrong is said of the first item at fault, in terms of the wire.

Failure modes: each member of a body produces its own error before the body is refused.
"""

import json
from typing import Any

from pydantic import ValidationError

from plaudit import wire
from plaudit.reward_service.http.service import ServiceLimits, too_long, too_many
from plaudit.reward_service.problems import ProblemError

MAX_REPORTED_ERRORS = 10
MAX_PATH_CHARS = 200
REQUEST_FIELDS = frozenset(wire.RewardRequest.model_fields)
ITEM_FIELDS = frozenset(wire.RewardItem.model_fields)
MESSAGE_FIELDS = frozenset(wire.ChatMessage.model_fields)
NEITHER = "a string or a list of messages is needed here"


def validated(raw: bytes | None, value: object, limits: ServiceLimits) -> wire.RewardRequest:
    """The request, from small JSON (`raw`) or a parsed value. A `ProblemError` names the first item at fault."""
    try:
        if raw is not None:
            request = wire.RewardRequest.model_validate_json(raw)
        else:
            _refuse_early(value, limits)
            request = wire.RewardRequest.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, raw, limits) from None
    if len(request.items) > limits.max_items:
        raise too_many(len(request.items), limits)
    if limits.max_text_chars < wire.MAX_TEXT_CHARS:
        for index, item in enumerate(request.items):
            if max(_chars(item.prompt), len(item.response)) > limits.max_text_chars:
                raise too_long(index, limits)
    return request


def _chars(prompt: str | list[wire.ChatMessage]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)


def _refuse_early(value: object, limits: ServiceLimits) -> None:
    """Refuse too many items and unknown keys before each of them is validated, and makes an error of its own."""
    if not isinstance(value, dict):
        return
    _refuse_unknown(value, REQUEST_FIELDS, (), None)
    items = value.get("items")
    if isinstance(items, list):
        if len(items) > limits.max_items:
            raise too_many(len(items), limits)
        for index, item in enumerate(items):
            if isinstance(item, dict):
                _refuse_unknown(item, ITEM_FIELDS, ("items", index), index)
                if isinstance(item.get("prompt"), list):
                    _refuse_messages(item["prompt"], index, limits)


def _refuse_messages(messages: list[Any], item: int, limits: ServiceLimits) -> None:
    chars = 0
    for index, message in enumerate(messages[: wire.MAX_MESSAGES + 1]):
        where = ("items", item, "prompt", index)
        if not isinstance(message, dict):
            raise _invalid_item(where, "a message is an object with role and content", item)
        _refuse_unknown(message, MESSAGE_FIELDS, where, item)
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise _invalid_item((*where, name), "a string is needed here", item)
        chars += len(message["content"])
    if len(messages) > wire.MAX_MESSAGES:
        raise _invalid_item(
            ("items", item, "prompt"), f"more than {wire.MAX_MESSAGES} messages; send the newest of them", item
        )
    if chars > limits.max_text_chars:
        raise too_long(item, limits)


def _invalid_item(where: tuple[int | str, ...], message: str, item: int) -> ProblemError:
    errors = [{"path": _path(where), "message": message}]
    return ProblemError("invalid-request", f"{_path(where)}: {message}", item=item, errors=errors)


def _refuse_unknown(
    value: dict[Any, Any], known: frozenset[str], where: tuple[int | str, ...], item: int | None
) -> None:
    if known.issuperset(value):
        return
    unknown = [_path((*where, str(key))) for key in value if key not in known][:MAX_REPORTED_ERRORS]
    message = "Extra inputs are not permitted"
    errors = [{"path": path, "message": message} for path in unknown]
    raise ProblemError("invalid-request", f"{unknown[0]}: {message}", item=item, errors=errors)


def _errors(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's list. A prompt that is neither a text nor a conversation has one error in place of one for each."""
    found: list[dict[str, Any]] = []
    for reported in error.errors(include_url=False, include_context=True, include_input=False):
        location, message, kind = reported["loc"], reported["msg"].removeprefix("Value error, "), reported["type"]
        if len(location) > 3 and location[0] == "items" and location[2] == "prompt":
            # The fourth place says which of the two was tried.
            if len(location) == 4 and kind in ("string_type", "list_type"):
                message = NEITHER
            location = (*location[:3], *location[4:])
        found.append({"loc": location, "msg": message, "type": kind, "ctx": reported.get("ctx", {})})
    nearer = {each["loc"][:3] for each in found if each["msg"] != NEITHER}
    whole: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in found:
        if each["msg"] != NEITHER or each["loc"] not in nearer:
            whole.setdefault((each["loc"], each["msg"]), each)
    return list(whole.values())


def _invalid(error: ValidationError, raw: bytes | None, limits: ServiceLimits) -> ProblemError:
    errors = _errors(error)
    first = errors[0]
    if first["type"] == "json_invalid" and raw is not None:
        # JSON may escape half of a surrogate pair, which is not text. Python's parser accepts it, so that
        # validation can say which item holds it.
        try:
            wire.RewardRequest.model_validate(json.loads(raw))
        except ValidationError as second:
            errors = _errors(second)
            first = errors[0]
        except (ValueError, RecursionError):
            return ProblemError("malformed-body", first["msg"])
    location = first["loc"]
    if location == ("items",) and first["type"] == "too_short":
        return ProblemError("empty-items", "`items` is empty; give at least one prompt and response")
    if location == ("items",) and first["type"] == "too_long":
        return too_many(first["ctx"]["actual_length"], limits)
    item = location[1] if len(location) > 1 and location[0] == "items" and isinstance(location[1], int) else None
    # Of a prompt as a whole, only its length is checked by a function of ours.
    is_too_long = first["type"] == "string_too_long" or (first["type"], location[2:]) == ("value_error", ("prompt",))
    name = "text-too-long" if is_too_long else "invalid-request"
    return ProblemError(
        name,
        f"{_path(location)}: {first['msg']}",
        item=item,
        errors=[{"path": _path(each["loc"]), "message": each["msg"]} for each in errors[:MAX_REPORTED_ERRORS]],
    )


def _path(location: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")[:MAX_PATH_CHARS] or "body"
