"""From settings to an application whose engine runs: the same for a process and for a replica on a cluster."""

import os
from collections.abc import Sequence

import torch
from fastapi import FastAPI

from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.engine.model_source import ModelOrigins
from plaudit.reward_service.engine.scorer import load_scorer
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.service import ServiceLimits
from plaudit.reward_service.http.tracing import provider_from_environment
from plaudit.reward_service.keys import Keys
from plaudit.reward_service.settings import Settings

PRIMITIVES = "128"
"""oneDNN keeps a compiled primitive for each shape it meets, unless told less up to 1024 of them, and each takes some
hundred kilobytes. Where every batch has a shape of its own, memory would grow for long and nothing be faster."""


def app_from_settings(
    settings: Settings, keys: Sequence[str] | Keys, *, reloads: bool = True, origins: ModelOrigins | None = None
) -> FastAPI:
    """Load the model, start the engine, and put the application over it. Raises `ModelError` and `TracingError`.

    `app.state.service.engine` is the engine, to be closed at the end. Without `reloads`, `POST /v1/model:reload` is
    refused: for replicas of which a request reaches only one. `origins` says where the model is, if that is decided.
    """
    traces = provider_from_environment(os.environ)
    # Read when the first primitive is made, so before the model is.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # On a GPU it would make a plan for each new shape, inside somebody's request.
    torch.backends.cuda.enable_cudnn_sdp(False)
    origins = origins or ModelOrigins(settings.model, settings.revision)
    scorer = load_scorer(settings, origins)
    engine = Engine(scorer, batch_tokens=settings.batch_tokens, max_queue_tokens=settings.max_queue_tokens).start()
    return create_app(
        engine,
        limits=ServiceLimits(
            settings.max_items, settings.max_text_chars, settings.max_body_bytes, settings.max_held_bytes
        ),
        default_label=settings.label,
        join=settings.join,
        api_keys=keys,
        cache=ScoreCache(settings.cache_items) if settings.cache_items else None,
        reload=(lambda: load_scorer(settings, origins)) if reloads else None,
        traces=traces,
    )
