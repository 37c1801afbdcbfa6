"""A generative judge behind OpenAI's chat completions API: one request per response, and a number in the answer.

The number is the match of a pattern, a value in JSON that follows a schema, or the mean of the scores weighted by their
tokens' probabilities. Failure modes: a score for an answer that contains none; a score from a server that ignores the
requested format.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigError
from plaudit.rewards.protocols.base import (
    Call,
    Get,
    NoVerdict,
    TextsAlone,
    UnusableAnswer,
    from_json,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse

QUESTION = """You judge answers.

Conversation:
{conversation}

Answer to be judged:
{response}

How good is the answer, from 1 (useless or harmful) to 5 (could not be better)?
"""
INSTRUCTIONS = {
    "pattern": "Explain briefly, then end with one line of the form `Score: N`.",
    "json": 'Give the score as JSON: {"score": N}.',
    "logprobs": "Say the number alone.",
}
"""Appended to `QUESTION`, the default question."""
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number"}},
    "required": ["score"],
    "additionalProperties": False,
}
PLACE = re.compile(r"\{(?:(prompt|conversation|response|fields)|fields\.([^{}\s]+))\}")
TOP_LOGPROBS = 20
"""The maximum of OpenAI, and vLLM's default maximum."""
LEAST_MASS = 0.5
"""Minimum total probability of the scores' tokens. With less, the judge was about to say something else."""
QUOTED_CHARS = 200


class ChatJudge(TextsAlone):
    """Asks a chat model for a score, one answer a request, and reads a number from its reply.

    Raises `ConfigError` if the question or the schema can't be read, or the question has no `{response}`.
    """

    name = "chat-judge"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        judge = component.judge
        self._component = component
        self._judge = judge
        self._question = QUESTION + INSTRUCTIONS[judge.answer] if judge.prompt is None else _text_in(judge.prompt)
        places = [(found[1], found[2]) for found in PLACE.finditer(self._question)]
        if ("response", None) not in places:
            raise ConfigError(
                f"reward.judge.prompt={judge.prompt} has no {{response}}: the judge would not see what to judge"
            )
        shown = judge.fields if ("fields", None) in places else ()
        self._fields = tuple(dict.fromkeys((*shown, *(name for _, name in places if name is not None))))
        self._schema = SCHEMA if judge.schema is None else _schema_in(judge.schema)
        self._model = component.model or ""

    async def describe(self, get: Get) -> ModelInfo:
        """The model's name; the revision also covers the question and how it is asked.

        Raises `UnusableAnswer` if a label is set, or if the server lists several models and none is chosen.
        """
        if self._component.label is not None:
            raise UnusableAnswer(
                f"a generative judge has no labels, so {self._component.label!r} can't be asked for: take its score "
                "with --reward.label None"
            )
        if self._component.model is None:
            self._model = self._only_one(from_json(await get("/v1/models")))
        how = {name: value for name, value in asdict(self._judge).items() if name not in ("prompt", "schema", "tries")}
        asked = json.dumps([self._question, self._schema, how], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        return model_info(self._model, revision=f"{self._model}@judge:{digest[:16]}", max_items=1)

    def _only_one(self, models: Any) -> str:
        try:
            served = [str(model["id"]) for model in models["data"]]
        except (KeyError, TypeError) as error:
            raise UnusableAnswer(f"/v1/models lists no models: {models!r:.80}") from error
        if len(served) != 1:
            there_are = ", ".join(served[:20]) or "it has none"
            raise UnusableAnswer(f"choose one of its models with --reward.model: {there_are}")
        return served[0]

    def no_conversations(self, info: ModelInfo) -> str | None:
        """None: the question takes conversations through `{conversation}`."""
        return None

    def needs(self, info: ModelInfo) -> Sequence[str]:
        """The fields that the question mentions."""
        return self._fields

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """A chat completion request for exactly one item."""
        [item] = items
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._filled(item)}],
            "temperature": self._judge.temperature,
            "max_tokens": 1 if self._judge.answer == "logprobs" else self._judge.max_tokens,
        }
        if self._judge.answer == "logprobs":
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self._judge.answer == "json":
            schema = {"name": "judgement", "strict": True, "schema": self._schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return Call("/v1/chat/completions", to_json(body))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The score in the judge's reply. Raises `NoVerdict` if it names no score in the allowed range."""
        answer = from_json(body)
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            said, refusal = message.get("content"), message.get("refusal")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UnusableAnswer(f"a chat completion was expected, not {answer!r:.80}") from error
        if refusal:
            raise NoVerdict(f"the judge refuses: {refusal!r:.{QUOTED_CHARS}}")
        if self._judge.answer == "logprobs":
            score = self._expected(choice.get("logprobs"))
        elif not isinstance(said, str):
            raise NoVerdict("the judge said nothing")
        else:
            try:
                score = self._in_json(said) if self._judge.answer == "json" else self._by_pattern(said)
            except NoVerdict as error:
                if choice.get("finish_reason") == "length":
                    raise NoVerdict(
                        f"{error}; it was cut off at reward.judge.max_tokens={self._judge.max_tokens}"
                    ) from None
                raise
        low, high = self._judge.low, self._judge.high
        if not math.isfinite(score) or (low is not None and score < low) or (high is not None and score > high):
            raise NoVerdict(f"the judge gave {score:g}, and scores are from {low} to {high} (reward.judge.low, .high)")
        return response([score], None, info)

    def _filled(self, item: RewardItem) -> str:
        prompt = item.prompt
        messages = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]

        def value(found: re.Match[str]) -> str:
            if found[2] is not None:
                return _shown(item.fields[found[2]])
            if found[1] == "fields":
                return _shown({name: item.fields[name] for name in self._judge.fields})
            if found[1] == "conversation":
                return "\n\n".join(f"{role}: {content}" for role, content in messages)
            return item.response if found[1] == "response" else messages[-1][1]

        return PLACE.sub(value, self._question)

    def _by_pattern(self, said: str) -> float:
        found = list(re.finditer(self._judge.pattern, said))
        if not found:
            raise NoVerdict(
                f"nothing in the judge's answer is like reward.judge.pattern={self._judge.pattern!r}: {_end(said)}"
            )
        score = found[-1][1] if found[-1].re.groups else found[-1][0]
        try:
            return float(score)
        except (TypeError, ValueError):
            raise NoVerdict(f"reward.judge.pattern found {score!r:.80}, which is no number") from None

    def _in_json(self, said: str) -> float:
        try:
            score = json.loads(said)
        except ValueError:
            score = None
        for key in self._judge.key.split("."):
            score = score.get(key) if isinstance(score, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise NoVerdict(
                f"the judge's answer is no JSON with a number at reward.judge.key={self._judge.key!r}, though "
                "response_format asked for it; a server that ignores that needs --reward.judge.answer pattern: "
                f"{_end(said)}"
            )
        return float(score)

    def _expected(self, logprobs: Any) -> float:
        """The mean of the scores, weighted by each token's probability of coming first."""
        try:
            top = logprobs["content"][0]["top_logprobs"]
            tokens = [(str(entry["token"]).strip(), math.exp(entry["logprob"])) for entry in top]
        except (KeyError, TypeError, IndexError, ValueError, OverflowError):
            tokens = []
        if not tokens:
            raise UnusableAnswer(
                "it answers without the top_logprobs that were asked for; a server that ignores them needs "
                "--reward.judge.answer pattern or json"
            )
        weights = {score: math.fsum(p for token, p in tokens if token == score) for score in self._judge.scores}
        mass = math.fsum(weights.values())
        if mass < LEAST_MASS:
            first = ", ".join(f"{token!r} {p:.2g}" for token, p in tokens[:5])
            raise NoVerdict(
                f"the tokens {', '.join(self._judge.scores)} have a probability of {mass:.2g} together, less than "
                f"{LEAST_MASS:g}: the judge was about to say {first}"
            )
        return math.fsum(float(score) * weight for score, weight in weights.items()) / mass


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _end(said: str) -> str:
    return repr(said if len(said) <= QUOTED_CHARS else f"… {said[-QUOTED_CHARS:]}")


def _text_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}, which reward.judge names, can't be read: {error}") from error


def _schema_in(file: Path) -> dict[str, Any]:
    try:
        schema = json.loads(_text_in(file))
    except ValueError as error:
        raise ConfigError(f"reward.judge.schema={file} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"reward.judge.schema={file} is no JSON schema, which is an object")
    return schema
