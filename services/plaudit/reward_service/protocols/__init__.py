"""Protocols of other servers, as thin adapters over the same engine, so that their clients work unchanged.

docs/reference/wire.md says what each one covers. Plaudit's own trainer needs none of them.
"""

from fastapi import APIRouter
from pydantic import BaseModel

from plaudit.reward_service.http.service import Service
from plaudit.reward_service.protocols import classify, kserve, listing, openrlhf, pooling, tei

HEALTH_PATHS = frozenset({"/health", "/ping", "/v2/health/live", "/v2/health/ready"})
"""Health routes of these protocols; like our own, they need no key."""

BODIES: list[type[BaseModel]] = [*tei.BODIES, *classify.BODIES, *pooling.BODIES, *openrlhf.BODIES, *kserve.BODIES]
"""Models of the request bodies, for the OpenAPI document."""


def routers(service: Service) -> list[APIRouter]:
    """One router for each protocol."""
    return [module.router(service) for module in (tei, classify, pooling, listing, openrlhf, kserve)]
