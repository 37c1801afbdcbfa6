"""Reward servers side by side: ours and others, the same model, the same texts, in turn.

    python -m benchmarks.service.speed closed --rounds 2 --seconds 6 --peer litserve=VENV/bin/python ...
    python -m benchmarks.service.speed open --servers ours naive
    python -m benchmarks.service.speed offline
    python -m benchmarks.service.speed front
    python -m benchmarks.service.speed idle --peer ...

The model is a random DistilBERT-base. Servers have core 0 (one torch thread), the load has core 1; only the server that
is measured runs, the others are stopped (SIGSTOP) meanwhile. `closed` has callers that each send their next text when
they have their last answer; `open` sends texts as they come (Poisson) at shares of what a closed loop of 64 got.
Rounds are interleaved, so that a slow minute of the machine hits every server; requests for each second of the server's
own CPU time tell what it does on a core that nobody else uses. Peers are named with the Python of their
own environment; docs/evidence/reward-speed.md says how to make them.
"""

import argparse
import asyncio
import contextlib
import fcntl
import functools
import json
import math
import operator
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.service.load import Draw, Measured, closed_loop, http_request, median_of, open_loop

WORDS = "the a movie film plot was is good bad great story not and but it this worst best acting of to in".split()  # noqa: SIM905
PEERS = Path(__file__).parent / "peers"
SERVER_CORE, LOAD_CORE = 0, 1
START_S = 300.0
LENGTHS = {
    # Tokens without the two special ones.
    "long-tailed": lambda draw: max(3, min(350, round(draw.lognormvariate(3.7, 0.8)))),
    "uniform": lambda draw: draw.randint(10, 100),
}


@dataclass(frozen=True)
class Recipe:
    """How to start a server and how to ask it. `{port}`, `{model}` and `{python}` are filled in."""

    command: tuple[str, ...]
    path: str = "/predict"
    body: str = "text"

    def request(self, text: str) -> bytes:
        bodies: dict[str, Any] = {
            "text": {"text": text},
            "texts": {"text": [text]},
            "instances": {"instances": [text]},
            "items": {"items": [{"prompt": text, "response": ""}]},
            "input": {"input": [text], "model": "judge", "raw_scores": True},
        }
        return http_request(self.path, json.dumps(bodies[self.body]).encode())


def _ours(*flags: str) -> Recipe:
    command = (
        sys.executable,
        "-m",
        "plaudit.reward_service",
        "--model",
        "{model}",
        "--label",
        "POSITIVE",
        "--threads",
        "1",
    )
    return Recipe((*command, "--port", "{port}", *flags), "/v1/rewards", "items")


RECIPES = {
    "ours": _ours(),
    "ours-int8": _ours("--dtype", "int8"),
    "ours-bf16": _ours("--dtype", "bf16"),
    "ours-deterministic": _ours("--deterministic"),
    "naive": Recipe((sys.executable, "naive.py", "{port}")),
    "pipeline": Recipe((sys.executable, "pipeline.py", "{port}")),
    "litserve": Recipe(("{python}", "litserve_server.py", "{port}")),
    "mosec": Recipe(("{python}", "mosec_server.py", "--port", "{port}", "--timeout", "600000"), "/inference"),
    "bentoml": Recipe(
        ("{python}", "-m", "bentoml", "serve", "bentoml_server:Rewards", "--port", "{port}"), "/predict", "texts"
    ),
    "kserve": Recipe(("{python}", "kserve_server.py", "{port}"), "/v1/models/judge:predict", "instances"),
    "rayserve": Recipe(("{python}", "rayserve_server.py", "{port}")),
    "infinity": Recipe(
        (
            *("{python}", "-c", "from infinity_emb.cli import cli; cli()", "v2", "--model-id", "{model}"),
            *("--served-model-name", "judge", "--port", "{port}", "--engine", "torch", "--device", "cpu"),
            *("--no-bettertransformer", "--no-model-warmup", "--batch-size", "32"),
        ),
        "/classify",
        "input",
    ),
}


class Server:
    """A server on its core, stopped except while it is measured."""

    def __init__(self, name: str, model: Path, python: str | None) -> None:
        self.name = name
        self._recipe = RECIPES[name]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        filled = [part.format(port=port, model=model, python=python) for part in self._recipe.command]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "REWARD_MODEL": str(model),
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if self._recipe.body != "items":
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *filled],
            env=environment,
            cwd=None if self._recipe.body == "items" else PEERS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def answers(self) -> bool:
        """Wait until it does."""
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            with contextlib.suppress(OSError):
                draw = functools.partial(self._recipe.request, "this movie was great")
                if run(closed_loop(self.url, draw, 1, 0.01)).ok:
                    return True
            time.sleep(0.5)
        print(f"{self.name} does not answer", file=sys.stderr)
        return False

    def draw(self, kind: str, seed: int) -> Draw:
        dice = random.Random(seed)
        length = LENGTHS[kind]
        return lambda: self._recipe.request(" ".join(dice.choices(WORDS, k=length(dice))))

    def _processes(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU time that the server has used, its children included."""
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        processes = self._processes()
        self.signal(signal.SIGCONT)
        self._process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def run(work: Coroutine[Any, Any, Measured]) -> Measured:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@contextlib.contextmanager
def held(locks: Sequence[Path]) -> Iterator[None]:
    """For a machine that others measure on too."""
    with contextlib.ExitStack() as stack:
        for path in locks:
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def servers(names: Sequence[str], pythons: dict[str, str]) -> Iterator[list[Server]]:
    """Those of them that answer, started one after the other, and asleep."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = random_distilbert(Path(folder) / "model")
        started = []
        for name in names:
            server = Server(name, model, pythons.get(name))
            stack.callback(server.stop)
            if server.answers():
                server.signal(signal.SIGSTOP)
                started.append(server)
        yield started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["closed", "open", "offline", "front", "idle"])
    parser.add_argument("--seconds", type=float, default=12.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9, 2.0], help="shares of capacity, for open")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--servers", nargs="*", choices=RECIPES, default=["ours", "ours-int8", "naive", "pipeline"])
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="and this, in its own Python"
    )
    parser.add_argument("--lock", type=Path, action="append", default=[], help="file to hold a lock on while measuring")
    arguments = parser.parse_args()
    pythons = dict(peer.split("=", 1) for peer in arguments.peer)
    names = [*arguments.servers, *(name for name in pythons if name not in arguments.servers)]
    if arguments.what != "offline":
        os.sched_setaffinity(0, {LOAD_CORE})
    if arguments.what == "front":
        front(arguments.seconds, arguments.rounds)
    elif arguments.what == "offline":
        offline(arguments.rounds)
    else:
        with servers(names, pythons) as started:
            if arguments.what == "idle":
                idle(started, arguments.seconds)
            elif arguments.what == "closed":
                closed(started, arguments)
            else:
                open_(started, arguments)


def closed(started: list[Server], arguments: argparse.Namespace) -> None:
    print("lengths      callers server                  rps  a CPU s   p50 ms   p95 ms   p99 ms errors  ratio, CPU s")
    for kind in arguments.lengths:
        for callers in arguments.callers:
            rounds: dict[str, list[Measured]] = {server.name: [] for server in started}
            for number in range(arguments.rounds):
                with held(arguments.lock):
                    for server in started:
                        with server.awake():
                            before = server.cpu_s()
                            work = closed_loop(server.url, server.draw(kind, number), callers, arguments.seconds)
                            result = run(work)
                            result.cpu_s = server.cpu_s() - before
                            rounds[server.name].append(result)
            peers = [name for name in rounds if not name.startswith("ours")]
            best = max((median_of(rounds[name], rps) for name in peers), default=math.nan)
            best_per_cpu_s = max((median_of(rounds[name], per_cpu_s) for name in peers), default=math.nan)
            for name, results in rounds.items():
                got, got_per_cpu_s = median_of(results, rps), median_of(results, per_cpu_s)
                cells = [median_of(results, operator.methodcaller("percentile", q)) * 1000 for q in (50, 95, 99)]
                failed = sum(each.errors.total() + len(each.refused) for each in results)
                print(
                    f"{kind:12} {callers:7} {name:19} {got:7.1f} {got_per_cpu_s:8.1f} "
                    f"{' '.join(f'{cell:8.0f}' for cell in cells)} {failed:6} "
                    f"{got / best:6.2f} {got_per_cpu_s / best_per_cpu_s:6.2f}",
                    flush=True,
                )


def rps(measured: Measured) -> float:
    return measured.rps


def per_cpu_s(measured: Measured) -> float:
    return measured.per_cpu_s


def open_(started: list[Server], arguments: argparse.Namespace) -> None:
    print("lengths       load server               sent/s    ok/s   p50 ms   p95 ms   p99 ms   429  429 p50/p99 errors")
    for kind in arguments.lengths:
        for server in started:
            with held(arguments.lock), server.awake():
                capacity = run(closed_loop(server.url, server.draw(kind, 0), 64, arguments.seconds)).rps
                for load in arguments.loads:
                    draw = server.draw(kind, 1)
                    result = run(open_loop(server.url, draw, capacity * load, arguments.seconds))
                    milliseconds = " ".join(f"{result.percentile(q) * 1000:8.0f}" for q in (50, 95, 99))
                    refusals = "/".join(f"{result.percentile(q, refused=True) * 1000:.1f}" for q in (50, 99))
                    print(
                        f"{kind:12} {load:5.0%} {server.name:19} {capacity * load:7.1f} {result.rps:7.1f} "
                        f"{milliseconds} {len(result.refused):5} {refusals:>15} {dict(result.errors)}",
                        flush=True,
                    )


def idle(started: list[Server], seconds: float) -> None:
    print(f"{'server':19} CPU while nothing is asked, share of a core")
    for server in started:
        with server.awake():
            time.sleep(1)
            before = server.cpu_s()
            time.sleep(seconds)
            print(f"{server.name:19} {(server.cpu_s() - before) / seconds:6.1%}", flush=True)


def front(seconds: float, rounds: int) -> None:
    """The service with a model that costs nothing, one core."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    request = RECIPES["ours"].request("This movie was great and wonderful, I would watch it again and again.")
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "benchmarks.service.null_model", str(port)]
    process = subprocess.Popen(command)
    try:
        while True:
            with contextlib.suppress(OSError):
                run(closed_loop(url, lambda: request, 16, 1.0))
                break
            time.sleep(0.2)
        watched = psutil.Process(process.pid)
        for callers in (16, 64, 256):
            for _ in range(rounds):
                before = watched.cpu_times()
                result = run(closed_loop(url, lambda: request, callers, seconds))
                after = watched.cpu_times()
                busy = after.user + after.system - before.user - before.system
                print(
                    f"{callers:4} callers: {result.rps:7.0f} requests/s, {len(result.ok) / busy:7.0f} a CPU second, "
                    f"p50 {result.percentile(50) * 1000:.1f} ms, p99 {result.percentile(99) * 1000:.1f} ms, "
                    f"errors {result.errors.total()}",
                    flush=True,
                )
    finally:
        process.terminate()
        process.wait()


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=LENGTHS[kind](dice))) for _ in range(count)]


def batches(encoded: Sequence[Any], tokens: int) -> Iterator[list[Any]]:
    """In order, of at most so many tokens each."""
    batch: list[Any] = []
    for text in encoded:
        if batch and sum(len(each.ids) for each in batch) + len(text.ids) > tokens:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def offline(rounds: int, count: int = 128, tokens: int = 2048) -> None:
    """Texts a second of the model called directly, in large batches without padding: what a server could do at most."""
    import torch

    from plaudit.reward_service.engine.scorer import load_scorer
    from plaudit.reward_service.settings import Settings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = random_distilbert(Path(folder) / "model")
        scorers = {dtype: load_scorer(Settings(model=str(model), dtype=dtype)) for dtype in ("fp32", "int8")}
        for kind in LENGTHS:
            for number in range(rounds):
                for dtype, scorer in scorers.items():
                    encoded = scorer.encode([(text, None) for text in texts(kind, count, number)])
                    started = time.process_time()
                    for batch in batches(encoded, tokens):
                        scorer.score(batch, 0)
                    print(
                        f"{kind:12} {dtype} {count / (time.process_time() - started):6.1f} texts a CPU second",
                        flush=True,
                    )


def random_distilbert(path: Path, layers: int = 6) -> Path:
    """DistilBERT-base with random weights and a word-level tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)
    # transformers 4, which some peers need, knows the tokenizer by its older name.
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        n_layers=layers, id2label=labels, label2id={name: index for index, name in labels.items()}
    )
    DistilBertForSequenceClassification(config).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
