"""The Open Inference Protocol (KServe v2, Triton): BYTES texts in, FP32 logits out, as JSON or Triton's binary tensors.

The first input holds texts, an optional second input their pairs. The model's name is the last part of its path, or
`reward`.
"""

import json
import struct
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from plaudit.reward_service.engine.batching import Plain
from plaudit.reward_service.http import openapi
from plaudit.reward_service.http.body import parse_json, read_body
from plaudit.reward_service.http.service import Service, ServiceLimits
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.protocols.common import Foreign, parsed, refuse_long_lists

HEADER_LENGTH = "inference-header-content-length"
MODEL_ALIAS = "reward"
MAX_DIMENSIONS = 8
"""Bound on the dimensions of a tensor. Texts have one or two."""


class TensorParameters(Foreign):
    """Where a tensor's data is: in the JSON, or in the binary part behind it."""

    binary_data_size: int | None = None
    binary_data: bool | None = None


class InputTensor(Foreign):
    """Texts."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=MAX_DIMENSIONS)]
    datatype: str
    data: list[Any] | None = None
    parameters: TensorParameters = TensorParameters()


class OutputRequest(Foreign):
    """An output that the client asks for."""

    name: str
    parameters: TensorParameters = TensorParameters()


class InferParameters(Foreign):
    """Parameters of the whole request."""

    binary_data_output: bool = False


class InferRequest(Foreign):
    """The JSON part of an inference request."""

    id: str | None = None
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(min_length=1, max_length=2)
    outputs: list[OutputRequest] | None = None


BODIES = [InferRequest]
EXAMPLE = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["A wonderful movie."]}]}
ANSWER = {
    "model_name": "reward",
    "model_version": "sha256:…",
    "outputs": [{"name": "logits", "shape": [1, 2], "datatype": "FP32", "data": [-2.28, 2.31]}],
}
NO_SUCH_MODEL: dict[int | str, dict[str, Any]] = {404: {"description": "No model of this name."}}


def router(service: Service) -> APIRouter:
    """The routes below `/v2`."""
    routes = APIRouter(prefix="/v2", tags=["KServe v2"])
    engine = service.engine

    def name() -> str:
        return engine.scorer.id.rstrip("/").rsplit("/", 1)[-1]

    def unknown(model: str) -> Response | None:
        if model in {name(), MODEL_ALIAS}:
            return None
        return JSONResponse({"error": f"Model with name {model} does not exist."}, 404)

    @routes.get("", summary="The server and its extensions")
    async def server() -> dict[str, Any]:
        return {"name": "plaudit-reward", "version": "2", "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live", summary="Liveness probe")
    async def live() -> dict[str, bool]:
        return {"live": True}

    health: dict[int | str, dict[str, Any]] = {200: {"description": "Ready."}, 503: {"description": "Not ready."}}

    @routes.get("/health/ready", summary="Readiness probe", responses=health)
    async def ready() -> Response:
        is_ready = engine.unready() is None
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @routes.get("/models/{model}/ready", summary="The same, for a model by name", responses=health | NO_SUCH_MODEL)
    async def model_ready(model: str) -> Response:
        is_ready = engine.unready() is None
        return unknown(model) or JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @routes.get("/models/{model}", summary="Inputs and outputs", responses=NO_SUCH_MODEL)
    async def metadata(model: str) -> Response:
        return unknown(model) or JSONResponse(
            {
                "name": model,
                "versions": [engine.scorer.revision],
                "platform": "pytorch",
                "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
                "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, len(engine.scorer.labels)]}],
            }
        )

    described: dict[str, Any] = {
        "openapi_extra": openapi.body(BODIES, {"logits": EXAMPLE}),
        "responses": openapi.answer(ANSWER, "Logits, row by row.") | NO_SUCH_MODEL,
    }

    @routes.post("/models/{model}/infer", summary="Logits for BYTES texts", **described)
    @routes.post("/models/{model}/versions/{version}/infer", summary="The same; the version is ignored", **described)
    async def infer(model: str, request: Request) -> Response:
        try:
            return unknown(model) or await _infer(service, model, request)
        except ProblemError as problem:
            service.record_refusal(request, problem)
            status = 400 if problem.status == 422 else problem.status
            return JSONResponse({"error": problem.detail}, status, headers=problem.headers())

    return routes


async def _infer(service: Service, model: str, request: Request) -> Response:
    body = await read_body(service, request)
    header, tail = await _split(body, request.headers.get(HEADER_LENGTH), service.limits)
    wanted = parsed(InferRequest, header)
    columns = []
    for tensor in wanted.inputs:
        column, tail = _strings(tensor, tail, service.limits)
        columns.append(column)
    del body, header, tail
    if len({len(column) for column in columns}) != 1:
        raise ProblemError("invalid-request", "the two inputs differ in length")
    texts: list[Plain] = [(row[0], row[1] if len(row) == 2 else None) for row in zip(*columns, strict=True)]
    service.check_limits(texts)
    scored = await service.score(texts, request)
    values = [logit for row in scored.logits for logit in row]
    output: dict[str, Any] = {"name": "logits", "shape": [len(texts), len(scored.scorer.labels)], "datatype": "FP32"}
    answer: dict[str, Any] = {"model_name": model, "model_version": scored.scorer.revision, "outputs": [output]}
    if wanted.id is not None:
        answer["id"] = wanted.id
    if not _binary_wanted(wanted):
        output["data"] = values
        return JSONResponse(answer)
    raw = struct.pack(f"<{len(values)}f", *values)
    output["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps(answer).encode()
    return Response(head + raw, media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(head))})


async def _split(body: bytes, header_length: str | None, limits: ServiceLimits) -> tuple[dict[str, Any], memoryview]:
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and int(header_length[:20]) <= len(body)):
            raise ProblemError(
                "malformed-body", f"{HEADER_LENGTH}: {header_length:.40} is not a number from 0 to {len(body)}"
            )
        length = int(header_length)
    header = await parse_json(body if length == len(body) else body[:length])
    if not isinstance(header, dict):
        raise ProblemError("malformed-body", "the header is not a JSON object")
    refuse_long_lists(header.values(), limits)
    tensors = header.get("inputs")
    for tensor in tensors if isinstance(tensors, list) else []:
        if isinstance(tensor, dict):
            refuse_long_lists(tensor.values(), limits)
    return header, memoryview(body)[length:]


def _strings(tensor: InputTensor, tail: memoryview, limits: ServiceLimits) -> tuple[list[str], memoryview]:
    """The tensor's strings, from its JSON data or the start of the binary part, and the rest of that part."""
    if tensor.datatype != "BYTES":
        raise ProblemError("invalid-request", f"input {tensor.name} is {tensor.datatype}; texts are BYTES")
    size = tensor.parameters.binary_data_size
    if size is None:
        data = tensor.data or []
        if not all(isinstance(text, str) for text in data):
            raise ProblemError("invalid-request", f"input {tensor.name} holds a value that is not a string")
        strings = list(data)
    else:
        strings = _unpacked(tensor.name, tail[: max(size, 0)], size, limits)
        tail = tail[size:]
    count = 1
    for extent in tensor.shape:
        count *= extent
    if count != len(strings):
        raise ProblemError(
            "invalid-request", f"input {tensor.name} has shape {tensor.shape} and {len(strings)} strings"
        )
    return strings, tail


def _unpacked(name: str, raw: memoryview, size: int, limits: ServiceLimits) -> list[str]:
    strings: list[str] = []
    position = 0
    try:
        if size < 0 or len(raw) != size:
            raise ValueError(f"{len(raw)} bytes for a binary_data_size of {size}")
        while position < size:
            if len(strings) == limits.max_items:
                raise ProblemError(
                    "too-many-items", f"input {name} holds more than the {limits.max_items} texts that are taken"
                )
            (length,) = struct.unpack_from("<I", raw, position)
            position += 4 + length
            if position > size:
                raise ValueError("a string ends after the tensor")
            strings.append(str(raw[position - length : position], "utf-8"))
    except (ValueError, struct.error) as error:
        raise ProblemError("malformed-body", f"input {name}: {error}") from None
    return strings


def _binary_wanted(wanted: InferRequest) -> bool:
    if wanted.outputs:
        choice = wanted.outputs[0].parameters.binary_data
        if choice is not None:
            return choice
    return wanted.parameters.binary_data_output
