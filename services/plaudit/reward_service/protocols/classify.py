"""`/classify`, which vLLM, SGLang and infinity define differently.

A body with `text` is SGLang's, one with `raw_scores` infinity's, any other vLLM's. An infinity client that sends no
`raw_scores` looks like vLLM's: it must use `/infinity/classify`.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, Field

from plaudit.reward_service.engine.batching import Plain, Scored, Text
from plaudit.reward_service.http import openapi
from plaudit.reward_service.http.service import Service
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols import messages
from plaudit.reward_service.protocols.common import Foreign, activated, parsed, ranked, read_json
from plaudit.reward_service.protocols.messages import Conversation


class TextsInput(Foreign):
    """vLLM's texts."""

    input: str | list[str]


class VllmRequest(TextsInput):
    """vLLM's body."""

    use_activation: bool | None = Field(default=None, validation_alias=AliasChoices("use_activation", "activation"))


class VllmChatRequest(Conversation):
    """vLLM's body with a conversation."""

    use_activation: bool | None = Field(default=None, validation_alias=AliasChoices("use_activation", "activation"))


class SglangRequest(Foreign):
    """SGLang's body: a text, texts, or texts and pairs."""

    text: str | list[str] | list[list[str]]


class InfinityRequest(Foreign):
    """infinity's body."""

    input: list[str]
    raw_scores: bool = False


BODIES: list[type[BaseModel]] = [VllmRequest, VllmChatRequest, SglangRequest, InfinityRequest]
EXAMPLES = {
    "vLLM, logits": {"input": ["A wonderful movie."], "use_activation": False},
    "vLLM, a conversation": messages.EXAMPLE,
    "SGLang": {"text": "A wonderful movie."},
    "infinity, logits": {"input": ["A wonderful movie."], "raw_scores": True},
}
VLLM_ANSWER = {
    "id": "classify-5f…",
    "object": "list",
    "created": 1750000000,
    "model": "models/imdb-distilbert-mini",
    "data": [{"index": 0, "label": "POSITIVE", "probs": [-2.28, 2.31], "num_classes": 2}],
    "usage": {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0, "prompt_tokens_details": None},
}
INFINITY_ANSWER = {
    "object": "classify",
    "data": [[{"label": "POSITIVE", "score": 2.31}, {"label": "NEGATIVE", "score": -2.28}]],
    "model": "models/imdb-distilbert-mini",
    "usage": {"prompt_tokens": 6, "total_tokens": 6},
    "id": "infinity-5f…",
    "created": 1750000000,
}


def router(service: Service) -> APIRouter:
    """`/classify` and `/infinity/classify`."""
    routes = APIRouter(tags=["vLLM, SGLang, infinity"])

    @routes.post(
        "/classify",
        summary="Logits or probabilities, for vLLM, SGLang and infinity clients",
        openapi_extra=openapi.body(BODIES, EXAMPLES),
        responses=openapi.answer(VLLM_ANSWER, "In the shape of the request's protocol; this is vLLM's."),
    )
    async def classify(request: Request) -> Response:
        try:
            body = await read_json(service, request)
            if "text" in body:
                return JSONResponse(await _answer_sglang(service, parsed(SglangRequest, body), request))
            if "raw_scores" in body:
                return JSONResponse(await _answer_infinity(service, parsed(InfinityRequest, body), request))
            wanted = parsed(VllmChatRequest, body) if "messages" in body else parsed(VllmRequest, body)
            return JSONResponse(await _answer_vllm(service, wanted, request))
        except ProblemError as problem:
            service.record_refusal(request, problem)
            return openai_error(problem)

    @routes.post(
        "/infinity/classify",
        summary="The same, always in infinity's protocol",
        openapi_extra=openapi.body([InfinityRequest], {"logits": EXAMPLES["infinity, logits"]}),
        responses=openapi.answer(INFINITY_ANSWER),
    )
    async def infinity(request: Request) -> Response:
        try:
            body = await read_json(service, request)
            return JSONResponse(await _answer_infinity(service, parsed(InfinityRequest, body), request))
        except ProblemError as problem:
            service.record_refusal(request, problem)
            return openai_error(problem)

    return routes


def openai_error(problem: ProblemError) -> Response:
    """An error in the shape of OpenAI-compatible servers: an invalid request is 400, never 422."""
    status = 400 if problem.status == 422 else problem.status
    error = {"message": problem.detail, "type": problem.name, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers=problem.headers())


def as_texts(value: str | list[str]) -> list[Plain]:
    """The texts of `input`."""
    return [(text, None) for text in ([value] if isinstance(value, str) else value)]


def usage(scored: Scored) -> dict[str, Any]:
    """The `usage` member: tokens of all texts together."""
    tokens = sum(scored.lengths)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def texts_of(service: Service, wanted: Conversation | TextsInput) -> Sequence[Text]:
    """The texts, or the one conversation, of vLLM's body, within the limits. Raises `ProblemError`."""
    if isinstance(wanted, Conversation):
        return messages.chat_of(service, wanted)
    texts = as_texts(wanted.input)
    service.check_limits(texts)
    return texts


async def _answer_vllm(service: Service, wanted: VllmRequest | VllmChatRequest, request: Request) -> dict[str, Any]:
    texts = texts_of(service, wanted)
    scored = await service.score(texts, request)
    labels = scored.scorer.labels
    data = []
    for index, row in enumerate(scored.logits):
        probs = list(row) if wanted.use_activation is False else activated(row)
        label = labels[max(range(len(row)), key=row.__getitem__)]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(row)})
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.scorer.id,
        "data": data,
        "usage": usage(scored),
    }


async def _answer_sglang(service: Service, wanted: SglangRequest, request: Request) -> Any:
    single = isinstance(wanted.text, str)
    texts: list[Plain] = []
    for index, text in enumerate([wanted.text] if isinstance(wanted.text, str) else wanted.text):
        parts = [text] if isinstance(text, str) else text
        if not 1 <= len(parts) <= 2:
            raise ProblemError("invalid-request", f"text[{index}]: a text or a pair, not {len(parts)} strings")
        texts.append((parts[0], parts[1] if len(parts) == 2 else None))
    service.check_limits(texts)
    scored = await service.score(texts, request)
    answers = [
        {"embedding": list(row), "meta_info": {"id": uuid.uuid4().hex, "finish_reason": None, "prompt_tokens": length}}
        for row, length in zip(scored.logits, scored.lengths, strict=True)
    ]
    return answers[0] if single else answers


async def _answer_infinity(service: Service, wanted: InfinityRequest, request: Request) -> dict[str, Any]:
    texts = as_texts(wanted.input)
    service.check_limits(texts)
    scored = await service.score(texts, request)
    rows = [list(row) if wanted.raw_scores else activated(row) for row in scored.logits]
    tokens = sum(scored.lengths)
    return {
        "object": "classify",
        "data": [ranked(scored.scorer.labels, row) for row in rows],
        "model": scored.scorer.id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "id": f"infinity-{uuid.uuid4()}",
        "created": int(time.time()),
    }
