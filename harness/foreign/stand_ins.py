"""Stand-ins that speak other reward servers' protocols over real HTTP: same routes, same shapes, same refusals.

Each is a function of method, path and body that gives status and answer. Their model has the labels NEGATIVE and
POSITIVE with the raw logits `logits(text)`.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from harness.stub_reward_server import stub_reward

LABELS = ["NEGATIVE", "POSITIVE"]
Server = Callable[[str, str, Any], tuple[int, Any]]
NOT_FOUND = 404, {"detail": "Not Found"}


def logits(text: str) -> list[float]:
    return [-2 * stub_reward(text, ""), 3 * stub_reward(text, "")]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exponentials = [math.exp(logit - top) for logit in row]
    return [e / sum(exponentials) for e in exponentials]


def ranked(row: list[float]) -> list[dict[str, Any]]:
    """As classifiers' servers answer: the best label first."""
    return sorted(
        ({"label": label, "score": s} for label, s in zip(LABELS, row, strict=True)), key=lambda e: -e["score"]
    )


def tei(method: str, path: str, body: Any) -> tuple[int, Any]:
    if path == "/health":
        return 200, None
    if path == "/info":
        classifier = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
        about = {"model_id": "tei/model", "model_sha": "abc123", "model_type": {"classifier": classifier}}
        return 200, about | {"max_client_batch_size": 8, "max_input_length": 512, "version": "1.9.3"}
    if (method, path) != ("POST", "/predict"):
        return NOT_FOUND
    texts = body["inputs"]
    if not all(isinstance(text, list) and len(text) == 1 for text in texts):
        return 422, {"error": "a list of texts is one pair", "error_type": "Validation"}
    if len(texts) > 8:
        return 422, {"error": "batch size > maximum allowed batch size 8", "error_type": "Validation"}
    rows = [logits(text[0]) for text in texts]
    return 200, [ranked(row if body.get("raw_scores") else softmax(row)) for row in rows]


def openrlhf(method: str, path: str, body: Any) -> tuple[int, Any]:
    if (method, path) != ("POST", "/get_reward") or body.keys() != {"query", "prompts", "labels"}:
        return NOT_FOUND
    assert all(query.startswith(prompt) for query, prompt in zip(body["query"], body["prompts"], strict=True))
    rewards = [logits(query)[1] for query in body["query"]]
    return 200, {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}


def vllm(method: str, path: str, body: Any, *, honours_use_activation: bool = True) -> tuple[int, Any]:
    if path == "/health":
        return 200, None
    if path == "/v1/models":
        return 200, {"object": "list", "data": [{"id": "vllm/model", "object": "model", "owned_by": "vllm"}]}
    if method != "POST" or path not in ("/classify", "/pooling"):
        return NOT_FOUND
    if body["model"] != "vllm/model":
        return 404, {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}
    data: list[dict[str, Any]] = []
    for index, text in enumerate(body["input"]):
        row = logits(text)
        winner = LABELS[row.index(max(row))]
        if body.get("use_activation") is not False or not honours_use_activation:
            row = softmax(row)
        if path == "/classify":
            data.append({"index": index, "label": winner, "probs": row, "num_classes": 2})
        else:
            data.append({"index": index, "object": "pooling", "data": row})
    return 200, {"id": "x", "object": "list", "created": 0, "model": "vllm/model", "data": data, "usage": {}}


def old_vllm(method: str, path: str, body: Any) -> tuple[int, Any]:
    """Ignores `use_activation`, as versions before it had the name do."""
    return vllm(method, path, body, honours_use_activation=False)


def vllm_out_of_order(method: str, path: str, body: Any) -> tuple[int, Any]:
    status, answer = vllm(method, path, body)
    if method == "POST":
        answer["data"].reverse()
    return status, answer


def vllm_repeating_an_index(method: str, path: str, body: Any) -> tuple[int, Any]:
    status, answer = vllm(method, path, body)
    if method == "POST":
        answer["data"][0]["index"] = answer["data"][-1]["index"]
    return status, answer


def infinity(method: str, path: str, body: Any, *, honours_raw_scores: bool = True) -> tuple[int, Any]:
    """As a version that honours `raw_scores` would answer."""
    if path == "/models":
        model = {"id": "infinity/model", "stats": {"queue_fraction": 0.0}, "object": "model", "owned_by": "infinity"}
        return 200, {"object": "list", "data": [model | {"backend": "torch", "capabilities": ["classify"]}]}
    if (method, path) != ("POST", "/classify"):
        return NOT_FOUND
    raw = body.get("raw_scores") and honours_raw_scores
    data = [ranked(logits(text) if raw else softmax(logits(text))) for text in body["input"]]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    return 200, {"object": "classify", "data": data, "model": "infinity/model", "usage": usage, "id": "x", "created": 0}


def infinity_0_0_78(method: str, path: str, body: Any) -> tuple[int, Any]:
    """As the released version answers: `raw_scores` is ignored."""
    return infinity(method, path, body, honours_raw_scores=False)


def with_sigmoids(method: str, path: str, body: Any) -> tuple[int, Any]:
    """A model of several labels that don't exclude each other, behind an infinity that ignores `raw_scores`."""
    status, answer = infinity(method, path, body)
    if method == "POST":
        for scores in answer["data"]:
            for entry in scores:
                entry["score"] = 1 / (1 + math.exp(-entry["score"]))
    return status, answer


def below(prefix: str, server: Server) -> Server:
    """The server behind a gateway that hands it what is below `prefix`."""

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        return server(method, path.removeprefix(prefix), body) if path.startswith(prefix) else NOT_FOUND

    return answer


def sglang(method: str, path: str, body: Any) -> tuple[int, Any]:
    if path == "/health":
        return 200, None
    if path == "/get_model_info":
        return 200, {"model_path": "sglang/model", "tokenizer_path": "sglang/model", "is_generation": False}
    if (method, path) != ("POST", "/classify"):
        return NOT_FOUND
    return 200, [
        {"embedding": [logits(text)[1]], "meta_info": {"id": "x", "prompt_tokens": 3}} for text in body["text"]
    ]


def hf_inference(method: str, path: str, body: Any) -> tuple[int, Any]:
    if method != "POST":
        return NOT_FOUND
    raw = body["parameters"].get("function_to_apply") == "none"
    rows = [logits(text) if raw else softmax(logits(text)) for text in body["inputs"]]
    return 200, [ranked(row)[: body["parameters"]["top_k"]] for row in rows]


def hf_best_label_only(method: str, path: str, body: Any) -> tuple[int, Any]:
    return 200, [ranked(logits(text))[0] for text in body["inputs"]]


def kserve(method: str, path: str, body: Any) -> tuple[int, Any]:
    if path == "/v2":
        return 200, {"name": "kserve", "version": "0.15", "extensions": []}
    if path == "/v2/models/judge/ready":
        return 200, {"name": "judge", "ready": True}
    if path == "/v2/models/judge":
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]
        outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
        return 200, {"name": "judge", "versions": ["3"], "platform": "pytorch", "inputs": inputs, "outputs": outputs}
    if path.startswith("/v2/models/") and not path.startswith("/v2/models/judge"):
        return 404, {"error": f"Model with name {path.split('/')[3]} does not exist."}
    if (method, path) != ("POST", "/v2/models/judge/infer"):
        return NOT_FOUND
    (tensor,) = body["inputs"]
    assert tensor["shape"] == [len(tensor["data"]), 1]
    flat = [logit for text in tensor["data"] for logit in logits(text)]
    output = {"name": "logits", "shape": [len(tensor["data"]), 2], "datatype": "FP32", "data": flat}
    return 200, {"model_name": "judge", "model_version": "3", "id": "x", "outputs": [output]}


SPOKEN: dict[str, tuple[Server, dict[str, Any]]] = {
    "tei": (tei, {"label": "POSITIVE"}),
    "openrlhf": (openrlhf, {}),
    "vllm-classify": (vllm, {"label_index": 1}),
    "vllm-pooling": (vllm, {"label_index": 1}),
    "sglang": (sglang, {}),
    "infinity": (infinity, {"label": "POSITIVE"}),
    "hf-inference": (hf_inference, {"label": "POSITIVE"}),
    "kserve": (kserve, {"label_index": 1, "model": "judge"}),
}
"""Each kind of endpoint, a stand-in that speaks it, and the settings it needs."""


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The URL at which `server` answers meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, value = server(self.command, self.path, body)
            payload = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()
