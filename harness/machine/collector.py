"""An OpenTelemetry collector that keeps the spans it is sent, as the protobuf says them."""

import gzip
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(ThreadingHTTPServer):
    """OTLP over HTTP on a free port of this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self._more = threading.Condition()

    def take(self, sent: bytes, headers: dict[str, str]) -> None:
        request = ExportTraceServiceRequest.FromString(sent)
        with self._more:
            self.headers.append(headers)
            for resource in request.resource_spans:
                self.services.add(str(attributes(resource.resource.attributes)["service.name"]))
                self.spans += [span for scope in resource.scope_spans for span in scope.spans]
            self._more.notify_all()

    def wait_for(self, count: int) -> list[Span]:
        """The spans, once there are so many."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.spans) >= count, timeout=60), self.spans
            return list(self.spans)


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        found = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        if found:
            self.server.take(body, dict(self.headers.items()))
        self.send_response(200 if found else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def attributes(pairs: Iterable[KeyValue]) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
