"""Reward servers side by side: requests a second and latency of ours and a naive one, same model, same texts, in turn.

    python benchmarks/reward_server.py --seconds 12 --rounds 3

The model is a random DistilBERT-base; the texts' lengths are long-tailed (log-normal, mean about 55 tokens). The server
runs on one core, the load (pin this process) on another, closed loop at each concurrency. Rounds are interleaved, so
that a slow minute of the machine hits every server.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

NAIVE = """
import sys, torch, uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
app = FastAPI()
@app.get("/readyz")
async def ready(): return {}
@app.post("/v1/rewards")
async def rewards(request: Request):
    texts = [item["prompt"] + item["response"] for item in (await request.json())["items"]]
    with torch.inference_mode():
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        return {"rewards": model(**inputs).logits[:, 1].tolist()}
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""
WORDS = "the a movie film plot was is good bad great story not and but it this worst best acting of to in".split()  # noqa: SIM905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--servers", nargs="+", default=["ours", "ours-int8", "naive"])
    parser.add_argument("--layers", type=int, default=6, help="layers of the random DistilBERT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = random_distilbert(Path(folder) / "model", arguments.layers)
        commands = server_commands(model, Path(folder))
        urls = {name: stack.enter_context(running(commands[name])) for name in arguments.servers}
        measured: dict[tuple[str, int], list[dict[str, float]]] = {}
        for concurrency in arguments.concurrency:
            for round_number in range(arguments.rounds):
                for name, url in urls.items():
                    result = asyncio.run(closed_loop(url, concurrency, arguments.seconds, seed=round_number))
                    measured.setdefault((name, concurrency), []).append(result)
    report(measured, arguments.servers, arguments.concurrency)


def random_distilbert(path: Path, layers: int) -> Path:
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
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        n_layers=layers, id2label=labels, label2id={name: index for index, name in labels.items()}
    )
    DistilBertForSequenceClassification(config).save_pretrained(path)
    return path


def server_commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """How to start each server; `{port}` is filled in later."""
    naive = folder / "naive.py"
    naive.write_text(NAIVE)
    ours = [sys.executable, "-m", "services.reward", "--model", str(model), "--label", "POSITIVE", "--threads", "1"]
    ours += ["--port", "{port}"]
    return {
        "ours": ours,
        "ours-int8": [*ours, "--dtype", "int8"],
        "ours-deterministic": [*ours, "--deterministic"],
        "naive": [sys.executable, str(naive), str(model), "{port}"],
    }


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[str]:
    """The server on core 0 and a free port, once it is ready; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pinned = ["taskset", "-c", "0", *(part.format(port=port) for part in command)]
    process = subprocess.Popen(pinned, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"server ended: {' '.join(pinned)}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def closed_loop(url: str, concurrency: int, seconds: float, seed: int) -> dict[str, float]:
    """`concurrency` callers, each sending its next text when it has its last answer."""
    draw = random.Random(seed)
    latencies: list[float] = []
    errors = 0
    started = time.perf_counter()
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def caller() -> None:
            nonlocal errors
            while time.perf_counter() < started + seconds:
                length = max(3, min(350, round(draw.lognormvariate(3.7, 0.8))))
                text = " ".join(draw.choices(WORDS, k=length))
                sent = time.perf_counter()
                answer = await http.post("/v1/rewards", json={"items": [{"prompt": text, "response": ""}]})
                if answer.status_code == 200:
                    latencies.append(time.perf_counter() - sent)
                else:
                    errors += 1

        await asyncio.gather(*(caller() for _ in range(concurrency)))
    elapsed = time.perf_counter() - started
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99
    return {"rps": len(latencies) / elapsed, "p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "errors": errors}


def report(measured: dict[tuple[str, int], list[dict[str, float]]], servers: list[str], counts: list[int]) -> None:
    """Medians over the rounds, and the ratio to the last server named."""
    print(f"{'server':20} {'c':>4} {'rps':>11} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'errors':>7} {'ratio':>6}")
    for concurrency in counts:
        base = statistics.median(result["rps"] for result in measured[servers[-1], concurrency])
        for name in servers:
            rounds = measured[name, concurrency]
            row = {key: statistics.median(result[key] for result in rounds) for key in rounds[0]}
            print(
                f"{name:20} {concurrency:4d} {row['rps']:11.1f} {row['p50'] * 1e3:8.0f} {row['p95'] * 1e3:8.0f} "
                f"{row['p99'] * 1e3:8.0f} {row['errors']:7.0f} {row['rps'] / base:6.2f}"
            )
    print(json.dumps({f"{name}@{concurrency}": rounds for (name, concurrency), rounds in measured.items()}))


if __name__ == "__main__":
    main()
