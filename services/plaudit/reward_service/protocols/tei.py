"""text-embeddings-inference: `/predict`, `/info`, health; and the Hugging Face inference API on `/` and `/predict`.

In TEI's protocol a list of two strings is one pair, not two texts. A body with `parameters` comes from a Hugging Face
client: there a list is a batch, and the answer is nested one level deeper.
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from plaudit.reward_service.engine.batching import Plain, Scored
from plaudit.reward_service.http import openapi
from plaudit.reward_service.http.service import Service
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols.common import Foreign, activated, parsed, ranked, read_json

ERROR_TYPES = {400: "Empty", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}


class PredictRequest(Foreign):
    """TEI's body."""

    inputs: str | list[str] | list[list[str]]
    truncate: bool | None = None
    truncation_direction: str | None = None
    raw_scores: bool = False


class HubParameters(Foreign):
    """Parameters of a Hugging Face client."""

    function_to_apply: str | None = None
    top_k: int | None = None


class HubRequest(Foreign):
    """The body of a Hugging Face client."""

    inputs: str | list[str]
    parameters: HubParameters


BODIES: list[type[BaseModel]] = [PredictRequest, HubRequest]
EXAMPLES = {
    "one text": {"inputs": "A wonderful movie.", "raw_scores": True},
    "a pair": {"inputs": ["Was it good?", "A wonderful movie."], "raw_scores": True},
    "a batch": {"inputs": [["A wonderful movie."], ["Was it good?", "Dreadful."]], "raw_scores": True},
    "from a Hugging Face client": {"inputs": "A wonderful movie.", "parameters": {"function_to_apply": "none"}},
}
PREDICTIONS = [{"label": "POSITIVE", "score": 2.31}, {"label": "NEGATIVE", "score": -2.28}]


def router(service: Service) -> APIRouter:
    """`/`, `/predict`, `/info` and the health routes."""
    routes = APIRouter(tags=["text-embeddings-inference, Hugging Face InferenceClient"])

    described: dict[str, Any] = {
        "openapi_extra": openapi.body(BODIES, EXAMPLES),
        "responses": openapi.answer(PREDICTIONS, "Every label, best first; a list of such lists for a batch."),
    }

    @routes.post("/", summary="The same as /predict", **described)
    @routes.post(
        "/predict", summary="Scores of every label, for text-embeddings-inference and Hugging Face", **described
    )
    async def predict(request: Request) -> Response:
        try:
            body = await read_json(service, request)
            if "parameters" in body:
                return JSONResponse(await _answer_hub(service, parsed(HubRequest, body), request))
            return JSONResponse(await _answer_tei(service, parsed(PredictRequest, body), request))
        except ProblemError as problem:
            service.record_refusal(request, problem)
            error_type = ERROR_TYPES.get(problem.status, "Backend")
            return JSONResponse(
                {"error": problem.detail, "error_type": error_type}, problem.status, headers=problem.headers()
            )

    ready: dict[str, Any] = {
        "summary": "Readiness probe",
        "response_class": Response,
        "responses": {
            200: {"description": "Ready."},
            503: {"description": "Not ready; `error` says why."},
        },
    }

    @routes.get("/", **ready)
    @routes.get("/health", **ready)
    @routes.get("/ping", **ready)
    async def health() -> Response:
        reason = service.engine.unready()
        return Response() if reason is None else JSONResponse({"error": reason, "error_type": "Unhealthy"}, 503)

    @routes.get("/info", summary="The model, and limits")
    async def info() -> dict[str, Any]:
        scorer = service.engine.scorer
        return {
            "model_id": scorer.id,
            "model_sha": scorer.revision,
            "model_dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(scorer.dtype, scorer.dtype),
            "served_model_name": scorer.id,
            "model_type": {
                "classifier": {
                    "id2label": {str(index): label for index, label in enumerate(scorer.labels)},
                    "label2id": {label: index for index, label in enumerate(scorer.labels)},
                }
            },
            "max_input_length": scorer.max_tokens,
            "max_batch_tokens": service.engine.batch_tokens,
            "max_client_batch_size": service.limits.max_items,
            "auto_truncate": True,
        }

    return routes


async def _answer_tei(service: Service, wanted: PredictRequest, request: Request) -> list[Any]:
    texts = _texts(wanted.inputs)
    if any(not first and not second for first, second in texts):
        raise ProblemError("empty-items", "Input validation error: `inputs` cannot be empty")
    service.check_limits(texts)
    scored = await service.score(texts, request)
    if wanted.truncate is False and scored.truncated:
        limit = scored.scorer.max_tokens
        raise ProblemError("invalid-request", f"Input validation error: `inputs` must have less than {limit} tokens")
    predictions = _predictions(scored, raw=wanted.raw_scores)
    batched = isinstance(wanted.inputs, list) and isinstance(wanted.inputs[0], list)
    return predictions if batched else predictions[0]


def _texts(inputs: str | list[str] | list[list[str]]) -> list[Plain]:
    if isinstance(inputs, str):
        return [(inputs, None)]
    groups = [inputs] if inputs and isinstance(inputs[0], str) else inputs
    texts: list[Plain] = []
    for group in groups:
        if not 1 <= len(group) <= 2:
            raise ProblemError("invalid-request", f"inputs: a text is [text] or [text, pair], not {len(group)} strings")
        texts.append((group[0], group[1] if len(group) == 2 else None))
    return texts


async def _answer_hub(service: Service, wanted: HubRequest, request: Request) -> list[Any]:
    texts: list[Plain] = [
        (text, None) for text in ([wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs)
    ]
    service.check_limits(texts)
    scored = await service.score(texts, request)
    predictions = _predictions(scored, raw=wanted.parameters.function_to_apply == "none")
    return [prediction[: wanted.parameters.top_k] for prediction in predictions]


def _predictions(scored: Scored, *, raw: bool) -> list[Any]:
    return [ranked(scored.scorer.labels, row if raw else activated(row)) for row in scored.logits]
