"""Foreign protocols: the peers' real clients where they can be installed, their recorded bodies elsewhere."""

import asyncio
import base64
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import Request
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from harness.scorers import FakeScorer
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.protocols import openrlhf

SOFTMAX_OF_2 = 1 / (1 + math.exp(-4))
"""The fake scorer's logits for two characters are 2 and -2."""


@pytest.fixture
def url(make_engine: Callable[..., Engine]) -> Iterator[str]:
    """A real server over the fake scorer, for clients that bring their own HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(make_engine(), default_label="MINUS")
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def post(make_engine: Callable[..., Engine], client_of: Callable[..., Any]) -> Callable[..., httpx.Response]:
    def send(path: str, body: Any, **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with client_of(make_engine(), **({"default_label": "MINUS"} | options)) as http:
                answer: httpx.Response = await http.post(path, json=body)
                return answer

        return asyncio.run(run())

    return send


@pytest.fixture
def hub_client(url: str, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    """The tests run without the hub; this client only ever calls the server above."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return InferenceClient(model=url)


def test_the_hugging_face_client_gets_every_label_best_first(hub_client: InferenceClient) -> None:
    raw = hub_client.text_classification("hi", function_to_apply="none")
    assert [(element.label, element.score) for element in raw] == [("LENGTH", 2), ("MINUS", -2)]
    [best] = hub_client.text_classification("hi", top_k=1)
    assert (best.label, best.score) == ("LENGTH", pytest.approx(SOFTMAX_OF_2))


def test_the_hugging_face_client_reads_our_refusal(hub_client: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="the model failed on"):
        hub_client.text_classification("poison")


@pytest.mark.parametrize("binary", [True, False])
def test_the_triton_client_gets_logits(url: str, binary: bool) -> None:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("reward")
    assert client.get_model_metadata("reward")["outputs"][0]["shape"] == [-1, 2]
    texts = triton.InferInput("text", [3], "BYTES")
    texts.set_data_from_numpy(np.array(["hi", "bonjour", "ü"], dtype=object), binary_data=binary)
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
    result = client.infer("reward", [texts], outputs=outputs, request_id="7")
    assert result.as_numpy("logits").tolist() == [[2, -2], [7, -7], [1, -1]]
    assert result.get_response()["id"] == "7"
    with pytest.raises(InferenceServerException):
        client.infer("nonesuch", [texts])
    client.close()


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("hi", [2, -2]),
        (["hi"], [2, -2]),
        (["hi", "you"], [5, -5]),
        ([["hi"], ["hi", "you"]], [[2, -2], [5, -5]]),
    ],
)
def test_tei_takes_every_form_of_inputs(post: Callable[..., httpx.Response], inputs: Any, expected: Any) -> None:
    answer = post("/predict", {"inputs": inputs, "raw_scores": True}).json()
    scores = (
        [[e["score"] for e in row] for row in answer] if isinstance(answer[0], list) else [e["score"] for e in answer]
    )
    assert scores == expected


@pytest.mark.parametrize(
    ("inputs", "error_type", "status"),
    [
        (["a", "b", "c"], "Validation", 422),
        ([], "Validation", 422),
        ([["a"], "b"], "Validation", 422),
        ("", "Validation", 422),
        ("poison", "Backend", 500),
    ],
)
def test_tei_errors_have_its_shape(
    post: Callable[..., httpx.Response], inputs: Any, error_type: str, status: int
) -> None:
    answer = post("/predict", {"inputs": inputs})
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert answer.json()["error"]


def test_tei_scores_are_probabilities_unless_raw(post: Callable[..., httpx.Response]) -> None:
    answer = post("/predict", {"inputs": "hi"}).json()
    assert answer == [
        {"label": "LENGTH", "score": pytest.approx(SOFTMAX_OF_2)},
        {"label": "MINUS", "score": pytest.approx(1 - SOFTMAX_OF_2)},
    ]


def test_openrlhf_gets_one_reward_for_each_query(post: Callable[..., httpx.Response]) -> None:
    answer = post("/get_reward", {"query": ["hi", "you"], "prompts": ["h", "y"], "labels": [None, 3]}).json()
    assert answer == {"rewards": [-2, -3], "scores": [-2, -3], "extra_logs": {}}
    assert post("/get_reward", {"query": []}).json()["rewards"] == []


def test_openrlhf_waits_at_the_door_of_a_full_queue(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = FakeScorer(held=True)
    waits = []

    async def open_the_gate(request: Request, wait_s: float) -> None:
        waits.append(wait_s)
        scorer.open()
        await asyncio.sleep(0)

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=8)
        async with client_of(engine, default_label="LENGTH") as http:
            first = asyncio.create_task(http.post("/get_reward", json={"query": ["a" * 8]}))
            await asyncio.to_thread(scorer.entered.acquire)
            monkeypatch.setattr(openrlhf, "sleep_while_connected", open_the_gate)
            second = asyncio.create_task(http.post("/get_reward", json={"query": ["b" * 7]}))
            assert (await first).json()["rewards"] == [8]
            assert (await second).json()["rewards"] == [7]

    asyncio.run(run())
    assert waits
    assert set(waits) == {1}


def test_vllm_classify_gives_raw_logits_on_request(post: Callable[..., httpx.Response]) -> None:
    answer = post("/classify", {"model": "any", "input": ["hi", "you"], "use_activation": False, "user": "x"}).json()
    assert [entry["probs"] for entry in answer["data"]] == [[2, -2], [3, -3]]
    assert [(entry["index"], entry["label"], entry["num_classes"]) for entry in answer["data"]] == [
        (0, "LENGTH", 2),
        (1, "LENGTH", 2),
    ]
    assert answer["usage"]["prompt_tokens"] == 5
    [entry] = post("/classify", {"input": "hi"}).json()["data"]
    assert entry["probs"] == pytest.approx([SOFTMAX_OF_2, 1 - SOFTMAX_OF_2])


def test_vllm_errors_are_400(post: Callable[..., httpx.Response]) -> None:
    bodies: list[dict[str, Any]] = [{"input": ""}, {"input": []}, {"input": 3}, {}]
    for body in bodies:
        answer = post("/classify", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_vllm_pooling_gives_numbers_or_base64(post: Callable[..., httpx.Response]) -> None:
    body = {"input": ["hi"], "use_activation": False}
    assert post("/pooling", body).json()["data"][0]["data"] == [2, -2]
    packed = post("/pooling", {**body, "encoding_format": "base64"}).json()["data"][0]["data"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (2, -2)
    assert post("/pooling", {**body, "task": "embed"}).status_code == 400


def test_sglang_classify_gives_logits_as_an_embedding(post: Callable[..., httpx.Response]) -> None:
    assert post("/classify", {"text": "hi"}).json()["embedding"] == [2, -2]
    answer = post("/classify", {"text": ["hi", "you"]}).json()
    assert [entry["embedding"][0] for entry in answer] == [2, 3]
    assert [entry["meta_info"]["prompt_tokens"] for entry in answer] == [2, 3]


@pytest.mark.parametrize("path", ["/classify", "/infinity/classify"])
def test_infinity_classify_honours_raw_scores(post: Callable[..., httpx.Response], path: str) -> None:
    answer = post(path, {"input": ["hi"], "model": "any", "raw_scores": True}).json()
    assert answer["object"] == "classify"
    assert answer["data"] == [[{"score": 2, "label": "LENGTH"}, {"score": -2, "label": "MINUS"}]]


@pytest.mark.parametrize(
    "path", ["/predict", "/classify", "/infinity/classify", "/pooling", "/get_reward", "/v2/models/fake/infer"]
)
def test_a_refusal_is_counted_whatever_protocol_it_was_told_in(
    path: str, make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    async def run() -> str:
        async with client_of(make_engine()) as http:
            assert (await http.post(path, content=b"[")).status_code == 400
            return str((await http.get("/metrics")).text)

    assert 'refused_requests_total{reason="malformed-body"} 1.0' in asyncio.run(run())
