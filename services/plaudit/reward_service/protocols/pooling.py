"""vLLM's `/pooling` for a classifier: a vector of logits or probabilities for each text, as numbers or base64."""

import base64
import struct
import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from plaudit.reward_service.http import openapi
from plaudit.reward_service.http.service import Service
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols import messages
from plaudit.reward_service.protocols.classify import TextsInput, openai_error, texts_of, usage
from plaudit.reward_service.protocols.common import Foreign, activated, parsed, read_json
from plaudit.reward_service.protocols.messages import Conversation


class _Options(Foreign):
    task: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    use_activation: bool | None = None


class PoolingRequest(_Options, TextsInput):
    """vLLM's body."""


class PoolingChatRequest(_Options, Conversation):
    """vLLM's body with a conversation."""


BODIES: list[type[BaseModel]] = [PoolingRequest, PoolingChatRequest]
ANSWER = {
    "id": "pool-5f…",
    "object": "list",
    "created": 1750000000,
    "model": "models/imdb-distilbert-mini",
    "data": [{"index": 0, "object": "pooling", "data": [-2.28, 2.31]}],
    "usage": {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0, "prompt_tokens_details": None},
}


def router(service: Service) -> APIRouter:
    """`/pooling`."""
    routes = APIRouter(tags=["vLLM, SGLang, infinity"])

    @routes.post(
        "/pooling",
        summary="A vector of logits or probabilities for each text, for vLLM clients",
        openapi_extra=openapi.body(
            BODIES,
            {
                "logits": {"input": ["A wonderful movie."], "use_activation": False},
                "a conversation": messages.EXAMPLE,
            },
        ),
        responses=openapi.answer(ANSWER),
    )
    async def pooling(request: Request) -> Response:
        try:
            body = await read_json(service, request)
            wanted = parsed(PoolingChatRequest, body) if "messages" in body else parsed(PoolingRequest, body)
            return JSONResponse(await _answer(service, wanted, request))
        except ProblemError as problem:
            service.record_refusal(request, problem)
            return openai_error(problem)

    return routes


async def _answer(service: Service, wanted: PoolingRequest | PoolingChatRequest, request: Request) -> dict[str, Any]:
    if wanted.task not in {None, "classify"}:
        raise ProblemError("invalid-request", f"Unsupported task: {wanted.task!r}; a classifier has classify")
    texts = texts_of(service, wanted)
    scored = await service.score(texts, request)
    vectors = [list(row) if wanted.use_activation is False else activated(row) for row in scored.logits]
    return {
        "id": f"pool-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.scorer.id,
        "data": [
            {
                "index": index,
                "object": "pooling",
                "data": vector if wanted.encoding_format == "float" else _packed(vector),
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": usage(scored),
    }


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
