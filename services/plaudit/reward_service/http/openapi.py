"""Request and response bodies in the OpenAPI document. Handlers read bodies themselves, so FastAPI can't know them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from plaudit import wire

JSON_TYPE = "application/json"
REFERENCE = "#/components/schemas/{model}"
PROBLEM = REFERENCE.format(model="Problem")


def body(models: Sequence[type[BaseModel]], examples: Mapping[str, Any], *types: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is one of these models, with examples."""
    references = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    described = {
        "schema": references[0] if len(references) == 1 else {"anyOf": references},
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    content = dict.fromkeys((JSON_TYPE, *types), described)
    return {"requestBody": {"required": True, "content": content}}


def answer(example: Any, description: str = "The scores.") -> dict[int | str, dict[str, Any]]:
    """For a foreign protocol's `responses`: an example answer, and that errors have that protocol's shape."""
    errors: dict[str, Any] = {JSON_TYPE: {}, wire.PROBLEM_CONTENT_TYPE: {"schema": {"$ref": PROBLEM}}}
    return {
        200: {"description": description, "content": {JSON_TYPE: {"example": example}}},
        "4XX": {
            "description": "Refused, in that protocol's shape; a problem document if the key or headers are at fault.",
            "content": errors,
        },
        "5XX": {"description": "The request was not scored. Retry 503 and 504.", "content": errors},
    }


def also(media_type: str, model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: a second media type of the answer."""
    return {200: {"content": {media_type: {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}}}


def refusals(**by_status: str) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: problem documents, `by_status="when"`."""
    return {
        status.removeprefix("s"): {
            "description": when,
            "content": {wire.PROBLEM_CONTENT_TYPE: {"schema": {"$ref": PROBLEM}}},
        }
        for status, when in by_status.items()
    }


def document(app: FastAPI, models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The OpenAPI document, built once. `models` are those that `body` refers to."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE)
        schema["components"]["schemas"] |= definitions["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
