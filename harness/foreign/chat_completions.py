"""A stand-in for OpenAI's chat completions: the same routes, shapes, checks and refusals, `logprobs` included.

`ChatServer` is what `harness.foreign.stand_ins.serving` serves. What the model says is a function of the question.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Reply = str | dict[str, float] | dict[str, Any]
MODEL = "judge-1"
TOP = 20


def refusal_of(message: str, param: str | None, code: str | None = None, status: int = 400) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@dataclass
class ChatServer:
    """`says(question)` is the whole answer; `knows(question)` gives the probability of each possible first token."""

    says: Callable[[str], str | None] = lambda question: "Score: 3"
    knows: Callable[[str], dict[str, float]] = lambda question: {"3": 1.0}
    has_logprobs: bool = True
    has_formats: bool = True
    """Whether `response_format` is honoured: what is said is JSON then."""
    refuses: Callable[[str], str | None] = lambda question: None
    finish_reason: str = "stop"
    models: tuple[str, ...] = (MODEL,)
    questions: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("GET", "/v1/models"):
            listed = [{"id": name, "object": "model", "created": 1700000000, "owned_by": "me"} for name in self.models]
            return 200, {"object": "list", "data": listed}
        if (method, path) != ("POST", "/v1/chat/completions"):
            return refusal_of(f"Invalid URL ({method} {path})", None, status=404)
        wrong = self._wrong(body)
        if wrong is not None:
            return wrong
        question = body["messages"][-1]["content"]
        self.questions.append(question)
        self.bodies.append(body)
        refusal = self.refuses(question)
        logprobs = None
        if body.get("logprobs"):
            tokens = sorted(self.knows(question).items(), key=lambda pair: -pair[1])
            said: str | None = tokens[0][0]
            if self.has_logprobs:
                logprobs = {"content": [_entry(*tokens[0]) | {"top_logprobs": [_entry(*t) for t in tokens[:TOP]]}]}
                logprobs["refusal"] = None  # type: ignore[assignment]
        else:
            said = self.says(question)
            if "response_format" in body and self.has_formats and said is not None:
                json.loads(said)
        content = None if refusal else said
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        number = next(self.numbers)
        return 200, {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 1700000000,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
            "service_tier": "default",
            "system_fingerprint": "fp_1",
        }

    def _wrong(self, body: Any) -> tuple[int, Any] | None:
        if not isinstance(body, dict) or body.get("model") not in self.models:
            return refusal_of("The model does not exist or you do not have access to it.", None, "model_not_found", 404)
        messages = body.get("messages")
        if not messages or any(set(message) != {"role", "content"} for message in messages):
            return refusal_of("Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
        if "top_logprobs" in body and body.get("logprobs") is not True:
            return refusal_of(
                "'top_logprobs' is allowed only when 'logprobs' is true.", "top_logprobs", "invalid_value"
            )
        if not 0 <= body.get("top_logprobs", 0) <= TOP:
            return refusal_of(f"'top_logprobs' must be from 0 to {TOP}.", "top_logprobs", "integer_above_max_value")
        wanted = body.get("response_format")
        if wanted is not None and not (
            wanted["type"] == "json_schema"
            and {"name", "schema", "strict"} == set(wanted["json_schema"])
            and wanted["json_schema"]["schema"].get("additionalProperties") is False
        ):
            return refusal_of("Invalid schema for response_format.", "response_format")
        return None


def _entry(token: str, probability: float) -> dict[str, Any]:
    return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}
