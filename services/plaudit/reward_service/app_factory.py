"""The app factory: an application with a running engine, from settings. Used by the program and by cluster replicas."""

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
"""Bound on oneDNN's cache of compiled primitives, one for each shape of a batch and some hundred kilobytes each. With
the default of 1024, memory grows for a long time and nothing gets faster."""


def app_from_settings(
    settings: Settings, keys: Sequence[str] | Keys, *, reloads: bool = True, origins: ModelOrigins | None = None
) -> FastAPI:
    """Load the model, start the engine, and create the application. Raises `ModelError` and `TracingError`.

    Close `app.state.service.engine` at the end. Without `reloads`, `POST /v1/model:reload` is refused: a request would
    reload only one of several replicas. `origins` are the model's files, if they are already resolved.
    """
    traces = provider_from_environment(os.environ)
    # oneDNN reads it when it makes the first primitive, so it is set before the model is loaded.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # On a GPU, cuDNN's attention would plan each new shape inside a request.
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
