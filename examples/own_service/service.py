"""A reward service of one's own: the reward of a text is the share of its words that end in "-ing"."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plaudit.wire import MODEL_PATH, Limits, ModelInfo, RewardRequest, RewardResponse

LIMITS = Limits(max_items=1024, max_text_chars=10_000, max_body_bytes=1 << 24, max_tokens=512)
MODEL = ModelInfo(id="ing", revision="1", labels=["ING"], limits=LIMITS)


def reward(text: str) -> float:
    words = text.split()
    return sum(word.endswith("ing") for word in words) / max(1, len(words))


class Service(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # /v1/model says what is served; health checks ask the other paths
        self.answer(MODEL.model_dump_json(exclude_none=True) if self.path == MODEL_PATH else "{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        rewards = [reward(item.response) for item in RewardRequest.model_validate_json(body).items]
        answer = RewardResponse(rewards=rewards, model=MODEL.id, revision=MODEL.revision, label="ING")
        self.answer(answer.model_dump_json())

    def answer(self, document: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(document.encode())))
        self.end_headers()
        self.wfile.write(document.encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8000), Service).serve_forever()
