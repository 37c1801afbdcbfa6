"""The routes with which vLLM, SGLang and infinity name the served model: their clients ask before they send texts."""

import time
from typing import Any

from fastapi import APIRouter

from plaudit.reward_service.http.service import Service


def router(service: Service) -> APIRouter:
    """The routes that name the served model."""
    routes = APIRouter(tags=["vLLM, SGLang, infinity"])
    started = int(time.time())

    def model(owner: str, **more: Any) -> dict[str, Any]:
        about = {"id": service.engine.scorer.id, "object": "model", "created": started, "owned_by": owner, **more}
        return {"object": "list", "data": [about]}

    @routes.get("/v1/models")
    async def vllm() -> dict[str, Any]:
        return model("plaudit-reward")

    @routes.get("/models")
    @routes.get("/infinity/models")
    async def infinity() -> dict[str, Any]:
        return model("infinity", stats={}, backend="torch", capabilities=["classify"])

    @routes.get("/get_model_info")
    async def sglang() -> dict[str, Any]:
        scorer = service.engine.scorer
        return {
            "model_path": scorer.id,
            "tokenizer_path": scorer.id,
            "is_generation": False,
            "weight_version": scorer.revision,
        }

    return routes
