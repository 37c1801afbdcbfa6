"""Part 4. The reward service on the card: requests a second and latencies, beside others and beside no server at all.

All servers run on the same card and are measured one after another; only the one that is measured has work. Callers
each send their next text when they have their last answer, from several processes, so that they are not the limit.
Texts are those of `benchmarks.service.servers`.
"""

import asyncio
import contextlib
import functools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.common import FORKS, Results, Setting, attempt, end_all, rounded, synchronized
from benchmarks.service.load import Measured, closed_loop, http_request
from benchmarks.service.servers import LENGTHS, PEERS, texts

WINDOW_S = 3.0
START_S = 60.0
LOAD_PROCESSES = 6
BATCH_TOKENS = 16_384
PREPARED = 4096
"""Different texts that callers send."""


@dataclass(frozen=True)
class Kind:
    """A server, and how it computes."""

    name: str
    ours: bool = True
    number_format: str = "fp32"
    file: str = ""

    def command(self, setting: Setting, port: int) -> list[str]:
        if not self.ours:
            return [sys.executable, str(PEERS / self.file), str(port)]
        dtype = "fp32" if self.number_format == "TF32" else self.number_format
        flags = ["--model", str(setting.judge), "--label", "POSITIVE", "--devices", setting.device, "--dtype", dtype]
        flags += ["--batch-tokens", str(BATCH_TOKENS), "--port", str(port)]
        return [sys.executable, "-m", "plaudit.reward_service", *flags]

    def environment(self, setting: Setting) -> dict[str, str]:
        dtypes = {"fp16": "float16", "bf16": "bfloat16"}
        plain = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
        if not self.ours:
            plain |= {"REWARD_MODEL": str(setting.judge), "REWARD_DEVICE": setting.device}
            plain["REWARD_DTYPE"] = dtypes.get(self.number_format, "float32")
        if self.number_format == "TF32":
            plain["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
        return plain

    def request(self, text: str) -> bytes:
        if self.ours:
            return http_request("/v1/rewards", json.dumps({"items": [{"prompt": text, "response": ""}]}).encode())
        return http_request("/predict", json.dumps({"text": text}).encode())


KINDS = (
    Kind("plaudit, fp16", number_format="fp16"),
    Kind("naive FastAPI, fp32", ours=False, file="naive.py"),
    Kind("pipeline, fp32", ours=False, file="pipeline.py"),
    Kind("plaudit, bf16", number_format="bf16"),
    Kind("plaudit, fp32", number_format="fp32"),
    Kind("plaudit, TF32", number_format="TF32"),
    Kind("naive FastAPI, fp16", ours=False, file="naive.py", number_format="fp16"),
)
LOADS = (
    ("long-tailed", 64),
    ("long-tailed", 256),
    ("long-tailed", 16),
    ("long-tailed", 1),
    ("uniform", 64),
    ("uniform", 256),
)
OFFLINE = ("fp16", "fp32", "TF32", "bf16")
FULL = ("plaudit, fp16", "naive FastAPI, fp32", "pipeline, fp32")
"""Those that meet every load; the others the first two."""


def measure(setting: Setting, results: Results) -> None:
    setting.models_ready()
    window_s = 0.3 if setting.tiny else WINDOW_S
    kinds = KINDS if setting.on_gpu else tuple(kind for kind in KINDS if kind.number_format == "fp32")
    loads = LOADS[:3:2] if setting.tiny else LOADS
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(server(setting, kind)) for kind in kinds]
        ready = [each for each in started if _answers(setting, results, each)]
        for number_format in OFFLINE if setting.on_gpu else ("fp32",):
            work = functools.partial(offline, setting, number_format)
            attempt(setting, results, "offline", {"format": number_format}, work, limit_s=30.0)
        for length, callers in loads:
            for each in ready:
                if each.kind.name not in FULL and (length, callers) not in LOADS[:2]:
                    continue
                if setting.left_s < window_s + 2:
                    results.leave_out("load", lengths=length, callers=callers, server=each.kind.name)
                    continue
                results.add("load", **under_load(each, length, callers, window_s))
        compare(results)


@dataclass(frozen=True)
class Server:
    """One that has been started."""

    kind: Kind
    url: str
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def server(setting: Setting, kind: Kind) -> Iterator[Server]:
    """Started, not waited for, and ended in the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(kind.command(setting, port), env=kind.environment(setting), stdin=subprocess.DEVNULL)
    try:
        yield Server(kind, f"http://127.0.0.1:{port}", process)
    finally:
        process.send_signal(signal.SIGTERM)
        end_all(process.pid)
        process.wait()


def _answers(setting: Setting, results: Results, each: Server) -> bool:
    give_up = time.monotonic() + min(START_S, setting.left_s)
    request = each.kind.request("this movie was great")
    while time.monotonic() < give_up and each.process.poll() is None:
        with contextlib.suppress(OSError):  # A timeout is one, too.
            if asyncio.run(asyncio.wait_for(closed_loop(each.url, lambda: request, 1, 0.01), 10.0)).ok:
                return True
        time.sleep(0.1)
    results.add("load", server=each.kind.name, error=f"it does not answer (exit code {each.process.poll()})")
    return False


def under_load(each: Server, lengths: str, callers: int, seconds: float) -> dict[str, Any]:
    """A closed loop of so many callers, spread over processes."""
    count = max(1, min(LOAD_PROCESSES, callers // 8, (os.cpu_count() or 1) // 2))
    shares = [callers // count + (i < callers % count) for i in range(count)]
    pipes, processes = [], []
    for number, share in enumerate(shares):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_call, args=(each, lengths, share, seconds, number, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    parts: list[Measured] = []
    errors: Counter[str] = Counter()
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            if pipe.poll(seconds + 15):
                parts.append(pipe.recv())
            else:
                errors["no answer from the callers"] += 1
        except EOFError:
            errors["the callers ended"] += 1
        process.kill()
        process.join(5)
    whole = Measured(elapsed=max((part.elapsed for part in parts), default=math.nan))
    for part in parts:
        whole.ok += part.ok
        whole.refused += part.refused
        errors += part.errors
    errors["refused"] += len(whole.refused)
    return {
        "lengths": lengths,
        "callers": callers,
        "server": each.kind.name,
        "requests_per_s": rounded(whole.rps),
        "p50_ms": rounded(whole.percentile(50) * 1e3, 3),
        "p99_ms": rounded(whole.percentile(99) * 1e3, 3),
        "errors": errors.total(),
    }


def _call(each: Server, lengths: str, callers: int, seconds: float, number: int, answer: Any) -> None:
    try:
        import uvloop

        dice = random.Random(number)
        requests = [each.kind.request(text) for text in texts(lengths, PREPARED // 4, seed=number)]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            warm = closed_loop(each.url, lambda: dice.choice(requests), callers, 0.2 * seconds)
            runner.run(warm)
            answer.send(runner.run(closed_loop(each.url, lambda: dice.choice(requests), callers, seconds)))
    finally:
        os._exit(0)


def offline(setting: Setting, number_format: str) -> list[dict[str, Any]]:
    """Texts a second without a server: the service's own scorer, and the plain model on batches sorted by length."""
    import torch

    from plaudit.reward_service.engine.scorer import load_scorer
    from plaudit.reward_service.settings import Settings

    torch.set_float32_matmul_precision("high" if number_format == "TF32" else "highest")
    dtype: Any = "fp32" if number_format == "TF32" else number_format
    model, devices = str(setting.judge), (setting.device,)
    scorer = load_scorer(Settings(model=model, dtype=dtype, devices=devices, batch_tokens=BATCH_TOKENS))
    rows = []
    for lengths in LENGTHS:
        given = texts(lengths, 32 if setting.tiny else PREPARED)
        began = time.perf_counter()
        encoded = scorer.encode([(text, None) for text in given])
        encoding_s = time.perf_counter() - began
        encoded.sort(key=lambda text: len(text.ids))
        batches = list(_padded_batches(encoded, BATCH_TOKENS))
        best = math.inf
        for _ in range(1 if setting.tiny else 3):
            began = synchronized(setting.device)
            for batch in batches:
                scorer.score(batch, 0)
            best = min(best, synchronized(setting.device) - began)
        rows.append(
            {
                "lengths": lengths,
                "tokens_mean": rounded(sum(len(text.ids) for text in encoded) / len(encoded), 3),
                "texts_per_s": rounded(len(given) / best),
                "with_tokenising": rounded(len(given) / (best + encoding_s)),
                "batches": len(batches),
            }
        )
    return rows


def _padded_batches(encoded: Sequence[Any], tokens: int) -> Iterator[list[Any]]:
    """In order, of at most so many tokens each with their padding."""
    batch: list[Any] = []
    for text in encoded:
        if batch and (len(batch) + 1) * max(len(text.ids), len(batch[-1].ids)) > tokens:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def compare(results: Results) -> None:
    """The service beside the best of the others, and beside itself without HTTP."""
    rows = [row for row in results.sections.get("load", []) if "requests_per_s" in row]
    offline_rows = {
        (row["format"], row["lengths"]): row["with_tokenising"]
        for row in results.sections.get("offline", [])
        if "texts_per_s" in row
    }
    for row in rows:
        if not row["server"].startswith("plaudit"):
            continue
        others = [
            other["requests_per_s"]
            for other in rows
            if not other["server"].startswith("plaudit")
            and (other["lengths"], other["callers"]) == (row["lengths"], row["callers"])
        ]
        most = offline_rows.get((row["server"].removeprefix("plaudit, "), row["lengths"]))
        results.add(
            "beside",
            server=row["server"],
            lengths=row["lengths"],
            callers=row["callers"],
            **({"times the best other": rounded(row["requests_per_s"] / max(others), 3)} if others else {}),
            **({"share of offline": f"{row['requests_per_s'] / most:.0%}"} if most else {}),
        )
