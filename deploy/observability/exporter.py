"""Export the newest step of every run in a directory tree to Prometheus. Needs only the standard library.

    python exporter.py RUNS [PORT]

`objective/kl` of runs/demo/ppo/metrics.jsonl becomes `plaudit_trainer_objective_kl{run="demo/ppo"}`. Runs without a
change in the last day are left out.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FORGET_AFTER_S = 86_400
TAIL_BYTES = 65_536


def exposition(runs: Path) -> str:
    """Prometheus text format: every number of each run's newest whole record, grouped by metric."""
    samples: dict[str, list[str]] = {}
    for run, record in newest_records(runs):
        label = json.dumps(run, ensure_ascii=False)
        for name, value in record.items():
            if isinstance(value, int | float):
                metric = "plaudit_trainer_" + re.sub(r"\W", "_", name, flags=re.ASCII)
                samples.setdefault(metric, []).append(f"{metric}{{run={label}}} {value}\n")
    return "".join(f"# TYPE {metric} gauge\n{''.join(lines)}" for metric, lines in sorted(samples.items()))


def newest_records(runs: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each run's name and last whole record."""
    for path in sorted(runs.glob("**/metrics.jsonl")):
        try:
            if time.time() - path.stat().st_mtime > FORGET_AFTER_S:
                continue
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            continue  # deleted between the listing and the reading
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a crash, or the tail's beginning
            if isinstance(record, dict):
                yield path.parent.relative_to(runs).as_posix(), record
                break


def handler(runs: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition(runs).encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 9100
    ThreadingHTTPServer(("", port), handler(Path(sys.argv[1]))).serve_forever()
