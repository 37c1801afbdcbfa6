"""Other servers' protocols over the same engine, a thin adapter each, so that existing clients need no change.

What each one covers, and what not, is in docs/wire.md. None of them is needed by Plaudit's own trainer.
"""

from fastapi import APIRouter
from pydantic import BaseModel

from plaudit.reward_service.http.service import Service
from plaudit.reward_service.protocols import classify, kserve, listing, openrlhf, pooling, tei

HEALTH_PATHS = frozenset({"/health", "/ping", "/v2/health/live", "/v2/health/ready"})
"""Foreign health routes; like our own they need no key."""

BODIES: list[type[BaseModel]] = [*tei.BODIES, *classify.BODIES, *pooling.BODIES, *openrlhf.BODIES, *kserve.BODIES]
"""Models of the bodies that the routes take, for the OpenAPI document."""


def routers(service: Service) -> list[APIRouter]:
    """One router for each protocol."""
    return [module.router(service) for module in (tei, classify, pooling, listing, openrlhf, kserve)]
