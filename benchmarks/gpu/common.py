"""What the parts share: where and how large, models made on the spot, results that survive a kill, work set apart.

Failure modes: a number is lost because something after it failed, or a check spoils the card for the next one. Each
check therefore has a process of its own, and each result is on disk before the next begins.
"""

import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("fork")
ERROR_CHARS = 400
PR_SET_PDEATHSIG = 1
DEMO_MODELS = Path(__file__).parents[2] / "trainer" / "plaudit" / "demo_models"
ADAPTED = ("c_attn",)


@dataclass(frozen=True)
class Setting:
    """Where the parts run, how large, and where things are."""

    device: str
    tiny: bool
    out: Path
    work: Path
    """For models and runs; nothing in it is kept."""
    bundle: Path
    apart: bool = True
    """Whether checks get processes of their own. Off where a fork can't use the card."""
    deadline: float = float("inf")
    """Of the part, as `time.monotonic` counts."""

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def policy(self) -> Path:
        """GPT-2 of 124M with random weights, or a tiny one; `models_ready` waits for it."""
        return self.work / "policy"

    @property
    def judge(self) -> Path:
        """DistilBERT-base with random weights, or a tiny one."""
        return self.work / "judge"

    @property
    def prompts(self) -> Path:
        return self.work / "prompts.jsonl"

    def models_ready(self) -> None:
        """Waits until `make_models` is done."""
        while not (self.work / "models-made").exists():
            if (self.work / "models-failed").exists():
                raise RuntimeError((self.work / "models-failed").read_text())
            time.sleep(0.05)


class Results:
    """One part's rows by section, written whole after every row."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part, self._began = path, part, time.monotonic()
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.complete = True
        """Whether nothing was left out for lack of time."""
        self._write("cut short")

    def add(self, section: str, **row: Any) -> None:
        """Another row of a section; columns are the names."""
        self.sections.setdefault(section, []).append(row)
        self._write("cut short")
        if self._part != "machine":  # The run itself says a line about that.
            print(f"{self._part}: {section}: {row}", flush=True)

    def leave_out(self, section: str, **row: Any) -> None:
        """Something for which there is no time."""
        self.complete = False
        self.add(section, **row, error="left out: no time")

    def end(self) -> None:
        """The last word: how it ended."""
        self._write("done" if self.complete else "short of time")

    def _write(self, state: str) -> None:
        whole = {
            "part": self._part,
            "state": state,
            "seconds": round(time.monotonic() - self._began, 1),
            "sections": self.sections,
        }
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1, default=str) + "\n")
        part.replace(self._path)


def attempt(
    setting: Setting,
    results: Results,
    section: str,
    row: Mapping[str, Any],
    work: Callable[[], Mapping[str, Any] | Sequence[Mapping[str, Any]] | None],
    *,
    limit_s: float = 60.0,
) -> bool:
    """Adds `row` with what `work` gave, one row or several, or with its error. Whether it worked.

    A row that `work` gives may name another section.
    """
    limit_s = min(limit_s, setting.left_s)
    if limit_s <= 0:
        results.leave_out(section, **row)
        return False
    began = time.monotonic()
    state, answer = _apart(work, limit_s) if setting.apart else _here(work)
    seconds = round(time.monotonic() - began, 1)
    if state == "error":
        results.add(section, **row, error=answer, took_s=seconds)
        return False
    for more in [answer] if isinstance(answer, Mapping) else answer or []:
        results.add(more.get("section", section), **{**row, **{k: v for k, v in more.items() if k != "section"}})
    return True


def _here(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", work()
    except Exception as error:
        traceback.print_exc()
        return "error", said(error)


def _apart(work: Callable[[], Any], limit_s: float) -> tuple[str, Any]:
    """In a forked process, so that whatever happens to the card happens to that process alone."""
    ours, theirs = FORKS.Pipe(duplex=False)

    def run() -> None:
        end_with_parent()
        try:
            theirs.send(("done", work()))
        except BaseException as error:
            traceback.print_exc()
            theirs.send(("error", said(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by the interpreter's own end: threads of the card's libraries may take their time.
        os._exit(0)

    process = FORKS.Process(target=run)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            return "error", f"not done after {limit_s:.0f} s"
        answer: tuple[str, Any] = ours.recv()
        return answer
    except EOFError:
        process.join(5)
        return "error", f"the process ended with {process.exitcode}"
    finally:
        assert process.pid is not None
        end_all(process.pid)
        process.join(5)
        ours.close()


def said(error: BaseException) -> str:
    """Type and text of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:ERROR_CHARS]


def end_with_parent() -> None:
    """Ends this process at once when its parent ends, even if that is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_all(pid: int, *, itself: bool = True) -> None:
    """Ends a process and all that it started, at once."""
    import psutil

    try:
        top = psutil.Process(pid)
        family = [*top.children(recursive=True), *([top] if itself else [])]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def make_models(setting: Setting) -> None:
    """Policy, judge and prompts in the work directory; a file there says that all are whole."""
    try:
        _make_models(setting)
    except BaseException as error:
        (setting.work / "models-failed").write_text(said(error))
        raise
    (setting.work / "models-made").touch()


def _make_models(setting: Setting) -> None:
    import torch
    from transformers import (
        AutoTokenizer,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
    )

    from plaudit.policy.from_scratch import train_tokenizer

    torch.manual_seed(0)
    if setting.tiny:
        texts = [f"This film number {i} was good, and the acting of it bad; I would see it again." for i in range(64)]
        setting.prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = train_tokenizer(texts, vocab_size=300, max_length=64)
    else:
        setting.prompts.write_text((setting.bundle / "prompts.jsonl").read_text())
        tokenizer = AutoTokenizer.from_pretrained(setting.bundle / "tokenizer")
    end = tokenizer.eos_token_id
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2} if setting.tiny else {}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    GPT2LMHeadModel(config).save_pretrained(setting.policy)
    tokenizer.save_pretrained(setting.policy)
    words = AutoTokenizer.from_pretrained(DEMO_MODELS / "imdb-distilbert-mini")
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    shape = {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 2} if setting.tiny else {}
    judge = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=max(30_522, len(words)),
            pad_token_id=words.pad_token_id,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            **shape,
        )
    )
    # A fresh head is drawn so small that its logits hardly differ.
    judge.classifier.weight.data *= 25
    judge.save_pretrained(setting.judge)
    words.model_max_length = 512
    words.save_pretrained(setting.judge)


FAMILIES = ("gpt2", "llama", "qwen2")
FORMATS = ("fp32", "TF32", "bf16")


def small_model(family: str, device: str, *, tiny: bool) -> Any:
    """A model of a family with random weights; heads are 64 wide, as in models of use, unless it is tiny."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    width, vocabulary = (32, 300) if tiny else (256, 1000)
    shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 2, "initializer_range": 0.1}
    shape |= {"num_attention_heads": max(2, width // 64), "max_position_embeddings": 128}
    shape |= {"bos_token_id": 0, "eos_token_id": 0}
    with torch.device(device):
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(**shape)).eval()
        shape |= {"intermediate_size": 2 * width, "num_key_value_heads": 1}
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).eval()


class Ends(Any):  # type: ignore[misc]  # stands in for a whole `Tokenizer`
    """As much of a tokenizer as sampling needs."""

    pad_token_id = 0
    eos_token_id = 0


def use_format(name: str) -> bool:
    """Sets how fp32 products are computed; whether to autocast to bf16 besides."""
    import torch

    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "TF32"
    return name == "bf16"


def policy_of(model: Any, number_format: str, *, r: int = 8) -> Any:
    """A policy with adapters that are not the identity, so that policy and reference differ."""
    import torch

    from plaudit.policy.adapters import add_lora
    from plaudit.policy.model import Policy
    from plaudit.settings.policy import LoraSettings

    autocast = torch.bfloat16 if use_format(number_format) else None
    adapted = add_lora(model, LoraSettings(r=r, alpha=2 * r))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return Policy(adapted, autocast=autocast)


def random_queries(count: int, vocabulary: int, *, at_least: int = 2, at_most: int = 8, seed: int = 0) -> Any:
    """Token lists of 2 to 8 tokens."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(1, vocabulary) for _ in range(draw.randint(at_least, at_most))] for _ in range(count)]


class Lengths:
    """Rewards that need no model and no wait: the number of characters."""

    def submit_components(
        self, prompts: Sequence[Any], responses: Sequence[str], fields: Mapping[str, Sequence[Any]] | None = None
    ) -> "Future[Any]":
        from plaudit.rewards import Scores

        rewards = lengths(prompts, responses)
        future: Future[Any] = Future()
        future.set_result(Scores(rewards, {"reward": rewards}))
        return future


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward function for runs."""
    return [len(response) / 10 for response in responses]


def synchronized(device: str) -> float:
    """The time, once the device has done all that was asked of it."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
