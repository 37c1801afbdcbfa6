"""OpenRLHF's remote reward model, `/get_reward`. `query` is prompt and response, already joined.

That client ignores `Retry-After` and gives up after five quick attempts. When the queue is full, its request therefore
waits here for admission instead of being refused.
"""

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from plaudit.reward_service.engine.batching import Plain, Scored
from plaudit.reward_service.http import openapi
from plaudit.reward_service.http.service import Service, sleep_while_connected, timeout_of
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols.common import Foreign, parsed, read_json

ADMISSION_WAIT_S = 150.0
"""How long a request waits for admission: less than the client's timeout of 180 s."""


class RewardQuery(Foreign):
    """OpenRLHF's body."""

    query: list[str]


BODIES = [RewardQuery]
EXAMPLE = {"query": ["This movie was wonderful."], "prompts": ["This movie"], "labels": [None]}


def router(service: Service) -> APIRouter:
    """`/get_reward`."""
    routes = APIRouter(tags=["OpenRLHF"])

    @routes.post(
        "/get_reward",
        summary="The default label's logit of each query, for OpenRLHF",
        openapi_extra=openapi.body(BODIES, {"one": EXAMPLE}),
        responses=openapi.answer({"rewards": [2.31], "scores": [2.31], "extra_logs": {}}),
    )
    async def get_reward(request: Request) -> Response:
        try:
            wanted = parsed(RewardQuery, await read_json(service, request))
            # With several URLs, this client sends empty requests to some of them.
            rewards = await _rewards(service, wanted.query, request) if wanted.query else []
        except ProblemError as problem:
            service.record_refusal(request, problem)
            return JSONResponse({"error": problem.detail}, problem.status, headers=problem.headers())
        extra: dict[str, Any] = {}
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": extra})

    return routes


async def _rewards(service: Service, queries: list[str], request: Request) -> list[float]:
    texts: list[Plain] = [(query, None) for query in queries]
    service.check_limits(texts)
    service.label_index(service.engine.scorer, None)  # refuse before the wait, not after it
    scored = await _score_patiently(service, texts, request)
    index = service.label_index(scored.scorer, None)
    return [row[index] for row in scored.logits]


async def _score_patiently(service: Service, texts: list[Plain], request: Request) -> Scored:
    timeout_s = timeout_of(request)
    give_up_at = time.monotonic() + (ADMISSION_WAIT_S if timeout_s is None else min(timeout_s, ADMISSION_WAIT_S))
    while True:
        try:
            return await service.score(texts, request)
        except ProblemError as problem:
            wait_s = problem.retry_after_s or 1
            if problem.name != "queue-full" or time.monotonic() + wait_s > give_up_at:
                raise
        with service.refused_by_drain():
            await sleep_while_connected(request, wait_s)
