"""Load on the reward service while it is stopped, reloaded and poisoned: what became of every request.

The service is the real program in a process of its own. Every reward that comes back is compared with the one that the
same model gives in this process. A request is `answered` when it got its rewards, `refused` when it got 429 or 503 or
found the port closed, `failed` when it got a 500 that names its poisonous item, `lost` when it was sent and no answer
came, and `wrong` when an answer isn't what it must be. Lost and wrong must be 0.
"""

import asyncio
import contextlib
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from harness.reward_service import RewardService
from plaudit.reward_service.engine.scorer import load_scorer
from plaudit.reward_service.settings import Settings

WORDS = "this movie film was great bad boring wonderful plot acting story and but not the worst best of it".split()  # noqa: SIM905
LABEL = "POSITIVE"
TOLERANCE = 1e-4
FAILS, NOT_FINITE = "zqxfails", "zqxnan"
"""Words whose tokens make the poisoned model's forward pass raise, and its logits NaN."""


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    by_revision: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """From sent to answered."""
    refused_seconds: list[float] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every request sent is accounted for, and each rightly."""
        accounted = self.answered + self.refused.total() + self.failed
        return accounted == self.sent and not self.lost and not self.wrong

    def __str__(self) -> str:
        parts = [f"sent {self.sent}", f"answered {self.answered}", f"refused {self.refused.total()}"]
        parts[-1] += (
            f" ({', '.join(f'{n} {name}' for name, n in sorted(self.refused.items()))})" if self.refused else ""
        )
        parts += [f"failed {self.failed}"] if self.failed else []
        parts += [f"lost {len(self.lost)}", f"wrong {len(self.wrong)}"]
        parts += [f"  {what}" for what in (self.lost + self.wrong)[:5]]
        return ", ".join(parts)


class Rewards:
    """The rewards that each revision of the model gives for a fixed set of texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self._by_revision: dict[str, dict[str, float]] = {}

    def learn(self, model: Path) -> str:
        """Score the texts with the model in this directory; its revision."""
        scorer = load_scorer(Settings(model=str(model), label=LABEL))
        index = scorer.labels.index(LABEL)
        rows = scorer.score(scorer.encode([(text, None) for text in self.texts]), 0)
        self._by_revision[scorer.revision] = {text: row[index] for text, row in zip(self.texts, rows, strict=True)}
        return scorer.revision

    def wrong_in(self, answer: dict[str, Any], texts: Sequence[str]) -> str | None:
        """What is wrong with the answer, if anything."""
        known = self._by_revision.get(answer["revision"])
        if known is None:
            return f"unknown revision {answer['revision']}"
        wanted = [known[text] for text in texts]
        if len(answer["rewards"]) != len(wanted):
            return f"{len(answer['rewards'])} rewards for {len(wanted)} texts"
        apart = max(abs(got - want) for got, want in zip(answer["rewards"], wanted, strict=True))
        return f"{apart:g} away from its revision's reward" if apart > TOLERANCE else None


class Http(Protocol):
    """What sends a request: `httpx.AsyncClient`, or something lighter."""

    async def post(self, path: str, /, *, json: Any) -> httpx.Response: ...


class Load:
    """Callers that each send their next request when the last one is answered, until told to stop."""

    def __init__(self, url: str, rewards: Rewards, *, poison: Sequence[str] = (), seed: int = 0) -> None:
        self.tally = Tally()
        self._url = url
        self._rewards = rewards
        self._poison = poison
        self._draw = random.Random(seed)
        self._stop = False
        self._progress = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def running(self, callers: int) -> AsyncIterator["Load"]:
        limits = httpx.Limits(max_connections=callers, max_keepalive_connections=callers)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as http:
            tasks = [asyncio.create_task(self._call(http)) for _ in range(callers)]
            try:
                yield self
            finally:
                self._stop = True
                await asyncio.gather(*tasks)

    async def answered(self, more: int) -> None:
        """Wait until so many more requests have been answered."""
        wanted = self.tally.answered + more
        async with self._progress:
            await self._progress.wait_for(lambda: self.tally.answered >= wanted)

    async def _call(self, http: httpx.AsyncClient) -> None:
        while not self._stop and await self.ask(http):
            async with self._progress:
                self._progress.notify_all()

    async def ask(self, http: Http) -> bool:
        """One request; whether the port is still open."""
        texts = self._draw.choices(self._rewards.texts, k=self._draw.randint(1, 8))
        poison = self._draw.choice(self._poison) if self._poison and self._draw.random() < 0.1 else None
        where = self._draw.randrange(len(texts))
        if poison is not None:
            texts[where] += poison
        tally = self.tally
        tally.sent += 1
        sent = time.perf_counter()
        try:
            answer = await http.post("/v1/rewards", json={"items": [{"prompt": "", "response": t} for t in texts]})
        except httpx.ConnectError:
            tally.refused["port closed"] += 1
            return False
        except httpx.TransportError as error:
            tally.lost.append(repr(error))
            return True
        seconds = time.perf_counter() - sent
        body = answer.json()
        if poison is not None:
            name = "scoring-failed" if poison.strip() == FAILS else "non-finite-score"
            if answer.status_code == 500 and (body["type"].endswith(name), body.get("item")) == (True, where):
                tally.failed += 1
            else:
                tally.wrong.append(f"item {where} is poisonous, and the answer is {answer.text[:200]}")
        elif answer.status_code == 200:
            wrong = self._rewards.wrong_in(body, texts)
            tally.answered += wrong is None
            tally.wrong += [wrong] if wrong else []
            tally.by_revision[body["revision"]] += 1
            tally.seconds.append(seconds)
        elif answer.status_code in {429, 503}:
            tally.refused[f"{answer.status_code}"] += 1
            tally.refused_seconds.append(seconds)
        else:
            tally.wrong.append(f"{answer.status_code} {answer.text[:200]}")
        return True


def some_texts(count: int = 200, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


async def drain(model: Path, *, callers: int, answers: int) -> Tally:
    """SIGTERM under load, with clients that dawdle: all that was accepted is answered, and the process ends with 0."""
    rewards = Rewards(some_texts())
    rewards.learn(model)
    with RewardService(model, "--label", LABEL, "--grace-s", "20") as service, contextlib.ExitStack() as dawdlers:
        for data in (b"", b"POST /v1/rewards HTTP/1.1\r\n", b"POST /v1/rewards HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
            dawdlers.enter_context(socket.create_connection(("127.0.0.1", service.port))).sendall(data)
        async with Load(service.url, rewards).running(callers) as load:
            await load.answered(answers)
            service.send_signal(signal.SIGTERM)
            drained = await asyncio.to_thread(service.next_event)
            code = await asyncio.to_thread(service.wait)
        if code != 0 or drained["answered"] != drained["accepted"]:
            load.tally.wrong.append(f"exit code {code}, {drained}")
        load.tally.seconds = [drained["seconds"]]
        return load.tally


async def reload(
    model: Path, *, callers: int, answers: int, enough: Callable[[int], bool]
) -> tuple[Tally, Counter[str]]:
    """Two models exchanged under load by request and by signal, with broken directories between."""
    happened: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", negated(model, Path(folder) / "two")
        shutil.copytree(model, one)
        served = Path(folder) / "served"
        shutil.copytree(one, served)
        rewards = Rewards(some_texts())
        revisions = [rewards.learn(one), rewards.learn(two)]
        with RewardService(served, "--label", LABEL) as service:
            async with (
                Load(service.url, rewards).running(callers) as load,
                httpx.AsyncClient(base_url=service.url, timeout=300) as http,
            ):
                turn = 0
                while not enough(turn):
                    turn += 1
                    await load.answered(answers)
                    broken = turn % 3 == 0
                    if broken:
                        (served / "model.safetensors").write_bytes(b"no weights")
                    else:
                        shutil.copytree((one, two)[turn % 3 % 2], served, dirs_exist_ok=True)
                    if turn % 2:
                        status = (await http.post("/v1/model:reload")).status_code
                        happened[f"request {'broken' if broken else 'reloads'}"] += 1
                        right = status == (409 if broken else 200)
                    else:
                        service.send_signal(signal.SIGHUP)
                        event = await asyncio.to_thread(service.next_event)
                        happened[f"signal {'broken' if broken else 'reloads'}"] += 1
                        right = event["event"] == ("reload-failed" if broken else "reloaded")
                    serving = (await http.get("/v1/model")).json()["revision"]
                    if not right or (not broken and serving != revisions[turn % 3 % 2]):
                        load.tally.wrong.append(f"turn {turn}: {serving} serves")
        return load.tally, happened


def negated(model: Path, path: Path) -> Path:
    """The same model, but it likes what the other dislikes."""
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = -weights[name]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


async def poison(model: Path, *, callers: int, enough: Callable[[Tally], bool]) -> Tally:
    """A tenth of the requests hold one text that the model can't judge: they fail, naming it, and no other does."""
    with tempfile.TemporaryDirectory() as folder:
        poisoned = poisonous(model, Path(folder) / "poisonous")
        rewards = Rewards(some_texts())
        rewards.learn(poisoned)
        with RewardService(poisoned, "--label", LABEL, program="harness.load.failing_service") as service:
            load = Load(service.url, rewards, poison=(f" {FAILS}", f" {NOT_FINITE}"))
            async with load.running(callers):
                while not enough(load.tally):
                    await load.answered(100)
        return load.tally


def poisonous(model: Path, path: Path) -> Path:
    """The same model with two more words: one has an embedding too large to reckon with, and the other is the last.

    `harness.load.failing_service` fails on the last word. A model that would do so itself is refused at the start.
    """
    shutil.copytree(model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(path)
    weights = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    rows = torch.full_like(weights[name][:2], torch.finfo(torch.float32).max)
    rows[1] = weights[name][-1]
    weights[name] = torch.cat([weights[name][: len(tokenizer)], rows])
    tokenizer.add_tokens([NOT_FINITE, FAILS])
    tokenizer.save_pretrained(path)
    config.vocab_size = len(tokenizer)
    config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
