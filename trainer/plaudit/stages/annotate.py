"""Simulated annotators, who use a real ranking service through the same routes as browsers."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import transformers
from rich.console import Console

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.parallel.devices import device_named
from plaudit.policy.pretrained import load_tokenizer
from plaudit.policy.reading import reading
from plaudit.rewards import RewardClient
from plaudit.run.annotator import Annotator, Habits, Judge, all_at_work
from plaudit.run.progress import Counting
from plaudit.run.rankings import RankingAdmin, RankingPerson
from plaudit.settings.annotate import AnnotateConfig

RANKED = ("counted", "surplus", "late")


@dataclass(frozen=True)
class AnnotateResult:
    """Statistics of an annotation run."""

    annotators: int
    statuses: Counter[str]
    """Number of submissions by status: counted, surplus, late, skipped."""
    waiting: int
    """Number of annotators who stopped while the remaining tasks were leased to others."""

    @property
    def ranked(self) -> int:
        """Number of rankings submitted."""
        return sum(self.statuses[status] for status in RANKED)


def run(config: AnnotateConfig) -> AnnotateResult:
    """Invite the annotators, let them rank until no tasks are left for them, and print the number of rankings.

    The same seed gives the same annotators, so a second run continues where the first one stopped.
    """
    with Counting("rankings") as counting, judging(config) as judge:
        with RankingAdmin(
            config.url, api_key_file=config.api_key_file, patience_s=config.patience_s, on_wait=counting.waiting
        ) as admin:
            links = [admin.invitation(name_of(config, i)) for i in range(config.annotators)]

        with ExitStack() as stack:
            people = [
                Annotator(
                    stack.enter_context(RankingPerson(config.url, link, patience_s=config.patience_s)),
                    judge,
                    habits_of(config, index),
                    person=name_of(config, index),
                    limit=config.limit,
                )
                for index, link in enumerate(links)
            ]
            waiting = all_at_work(
                people, concurrency=config.concurrency, patience_s=config.patience_s, on_done=counting.add
            )
    done = sum((person.statuses for person in people), Counter[str]())
    result = AnnotateResult(config.annotators, done, waiting)
    _say(result)
    return result


def name_of(config: AnnotateConfig, index: int) -> str:
    """The name of one annotator, as administrators of the service see it."""
    return f"simulated {config.seed}.{index}"


def habits_of(config: AnnotateConfig, index: int) -> Habits:
    """The noise settings of one annotator."""
    names = ("temperature", "tie_margin", "carelessness", "skips")
    return Habits(**{name: config.of(name, index) for name in names})


@contextmanager
def judging(config: AnnotateConfig) -> Iterator[Judge]:
    """The judge behind the annotators: a classifier in this process, or the reward endpoints."""
    if config.judge is not None:
        yield _Classifier(config.judge, config.label, config.device)
        return
    if not config.reward.says_whom_to_ask:
        raise ConfigError(
            "the annotators have no judge: name a classifier with --judge, or a reward endpoint with --reward.url"
        )
    with RewardClient(config.reward) as client:
        client.connect()
        yield lambda prompt, answers: client.score([prompt] * len(answers), answers)


class _Classifier:
    """Raw logits of prompt and answer joined to one text. A lock admits one thread at a time."""

    def __init__(self, path: str, label: str, device: str | None) -> None:
        try:
            with reading(path):
                self._tokenizer = load_tokenizer(path, setting="judge")
                model = transformers.AutoModelForSequenceClassification.from_pretrained(demo_models.resolve(path))
        except (ConfigError, OSError, ValueError) as error:
            raise ConfigError(
                f"judge={path!r} is no classifier that loads ({' '.join(str(error).split()):.160})"
            ) from error
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.eval().to(device_named(device))
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        if len(labels) > 1 and label not in labels:
            raise ConfigError(f"judge={path!r} has no label {label!r}; its labels are {', '.join(labels)}")
        self._index = labels.index(label) if len(labels) > 1 else 0
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        limit = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 10**9))
        given = self._tokenizer(
            [prompt + answer for answer in answers],
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(self._model.device)
        with self._lock:
            logits = self._model(**given).logits
        scores: list[float] = logits[:, self._index].double().tolist()
        return scores


def _say(result: AnnotateResult) -> None:
    parts = ", ".join(f"{result.statuses[status]} {status}" for status in sorted(result.statuses)) or "none"
    console = Console()
    console.print(
        f"{result.annotators} annotators submitted {result.ranked} rankings ({parts})", highlight=False, soft_wrap=True
    )
    if result.waiting:
        console.print(
            f"{result.waiting} of them stopped while others still held tasks: run the same command again to go on",
            highlight=False,
            soft_wrap=True,
        )
