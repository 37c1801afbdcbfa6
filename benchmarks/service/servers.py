"""The servers that `speed` compares: how each is started, kept on its core, asked, and read.

Peers run in `peers/`, some with the Python of an environment of their own.
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
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvloop

from benchmarks.service.comparison import Difference, difference_of, refusal_of
from benchmarks.service.load import Draw, Measured, closed_loop, http_request

WORDS = "the a movie film plot was is good bad great story not and but it this worst best acting of to in".split()  # noqa: SIM905
PEERS = Path(__file__).parent / "peers"
SERVER_CORE, LOAD_CORE = 0, 1
START_S = 300.0
PROBES = 32
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
    number_format: str = "fp32"

    @property
    def needs_python(self) -> bool:
        """Whether it runs in an environment of its own."""
        return "{python}" in self.command

    def request(self, text: str) -> bytes:
        """The request as bytes on the wire."""
        return http_request(self.path, json.dumps(self.asked(text)).encode())

    def asked(self, text: str) -> Any:
        """The body of a request for one text."""
        bodies: dict[str, Any] = {
            "text": {"text": text},
            "texts": {"text": [text]},
            "instances": {"instances": [text]},
            "items": {"items": [{"prompt": text, "response": ""}]},
            "input": {"input": [text], "model": "judge", "raw_scores": True},
        }
        return bodies[self.body]

    def reward(self, answer: Any) -> float:
        """The reward in the body of an answer to one text."""
        match self.body:
            case "text":
                return float(answer["reward"])
            case "texts":
                return float(answer[0])
            case "instances":
                return float(answer["predictions"][0])
            case "items":
                return float(answer["rewards"][0])
            case _:
                return next(float(label["score"]) for label in answer["data"][0] if label["label"] == "POSITIVE")


def _ours(*flags: str, number_format: str = "fp32") -> Recipe:
    command = (sys.executable, "-m", "plaudit.reward_service", "--model", "{model}", "--label", "POSITIVE")
    flags = ("--threads", "1", "--port", "{port}", "--dtype", number_format, *flags)
    return Recipe((*command, *flags), "/v1/rewards", "items", number_format)


def _fastapi(engine: str, number_format: str, how: str) -> Recipe:
    """`peers/fastapi_server.py`; torch is in this environment."""
    python = sys.executable if engine == "torch" else "{python}"
    return Recipe((python, "fastapi_server.py", "{port}", engine, number_format, how), number_format=number_format)


RECIPES = {
    "ours": _ours(),
    "ours-int8": _ours(number_format="int8"),
    "ours-bf16": _ours(number_format="bf16"),
    "ours-deterministic": _ours("--deterministic"),
    "naive": Recipe((sys.executable, "naive.py", "{port}")),
    "pipeline": Recipe((sys.executable, "pipeline.py", "{port}")),
    "batched": _fastapi("torch", "fp32", "batched"),
    "naive-int8": _fastapi("torch", "int8", "alone"),
    "batched-int8": _fastapi("torch", "int8", "batched"),
    "onnxruntime": _fastapi("onnxruntime", "fp32", "alone"),
    "onnxruntime-batched": _fastapi("onnxruntime", "fp32", "batched"),
    "onnxruntime-int8": _fastapi("onnxruntime", "int8", "alone"),
    "onnxruntime-int8-batched": _fastapi("onnxruntime", "int8", "batched"),
    "openvino": _fastapi("openvino", "fp32", "alone"),
    "openvino-batched": _fastapi("openvino", "fp32", "batched"),
    "openvino-int8": _fastapi("openvino", "int8", "alone"),
    "openvino-int8-batched": _fastapi("openvino", "int8", "batched"),
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
        self.number_format = self._recipe.number_format
        self.difference = Difference(math.nan, math.nan)
        """From the model's own rewards; known once it is checked."""
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
        self._complaints = model.parent / f"{name}.stderr"
        with self._complaints.open("wb") as complaints:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(SERVER_CORE), *filled],
                env=environment,
                cwd=None if self._recipe.body == "items" else PEERS,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                start_new_session=True,
            )

    def answers(self) -> bool:
        """Wait until it does. If it ends instead, print the last line that it wrote to stderr."""
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            with contextlib.suppress(OSError):
                draw = functools.partial(self._recipe.request, "this movie was great")
                if run(closed_loop(self.url, draw, 1, 0.01)).ok:
                    return True
            time.sleep(0.5)
        said = self._complaints.read_text(errors="replace").strip().splitlines()
        print(f"{self.name} does not answer: {said[-1] if said else 'it printed nothing'}", file=sys.stderr)
        return False

    def rewards(self, texts: Sequence[str]) -> list[float]:
        """The rewards of these texts, all asked for at once, so that a server that batches does."""

        async def ask() -> list[float]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self.url, timeout=START_S, limits=limits, trust_env=False) as client:
                posts = [client.post(self._recipe.path, json=self._recipe.asked(text)) for text in texts]
                return [self._recipe.reward(got.raise_for_status().json()) for got in await asyncio.gather(*posts)]

        return asyncio.run(ask())

    def draw(self, kind: str, seed: int) -> Draw:
        dice = random.Random(seed)
        length = LENGTHS[kind]
        return lambda: self._recipe.request(" ".join(dice.choices(WORDS, k=length(dice))))

    def _processes(self) -> list[psutil.Process]:
        """It and its children; none if it has ended."""
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

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
        self._process.wait()


def run(work: Coroutine[Any, Any, Measured]) -> Measured:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@contextlib.contextmanager
def servers(names: Sequence[str], pythons: dict[str, str]) -> Iterator[list[Server]]:
    """Those of them that answer as the model does, started one after the other, and asleep."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = random_distilbert(Path(folder) / "model")
        probes = texts("long-tailed", PROBES, seed=1)
        expected = rewards_by_transformers(model, probes)
        started = []
        for name in names:
            server = Server(name, model, pythons.get(name))
            stack.callback(server.stop)
            if not server.answers():
                continue
            try:
                server.difference = difference_of(server.rewards(probes), expected)
            except httpx.HTTPError as error:
                refusal = f"asked for {PROBES} rewards at once, {error!r}"
            else:
                refusal = refusal_of(server.number_format, server.difference, expected)
            server.signal(signal.SIGSTOP)
            if refusal:
                print(f"{name} is not timed: {refusal}", file=sys.stderr)
            else:
                started.append(server)
        yield started


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=LENGTHS[kind](dice))) for _ in range(count)]


def rewards_by_transformers(model: Path, texts: Sequence[str]) -> list[float]:
    """The reference: each text alone in fp32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        return [classifier(**tokenizer([text], return_tensors="pt")).logits[0, 1].item() for text in texts]


def random_distilbert(path: Path, layers: int = 6) -> Path:
    """DistilBERT-base with random weights, the same each time, and a word-level tokenizer over WORDS."""
    import torch
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DistilBertForSequenceClassification(config).save_pretrained(path)
    return path
