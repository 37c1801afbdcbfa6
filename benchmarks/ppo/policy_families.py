"""Families of policies: their log-probabilities and samples beside plain transformers', and a whole run of stage 3.

    python -m benchmarks.ppo.policy_families [--table docs/evidence/models.md] [FAMILY ...]

Tiny random models of each family, 64 positions, fp32. One table has three parts:

- Log-probabilities: the largest difference from plain transformers, one text at a time without padding or cache. Texts
  are short (up to 22 tokens) or as long as the positions allow, padded to a batch or packed one behind the other.
  "fp32" is how far plain transformers itself is from double precision: no program is closer.
- Sampling: whether it uses the model's cache. The samples of a batch must be those of each prompt alone, those without
  a cache, and with top-k 1 the texts of `transformers.generate`, up to the same end token. What isn't so is named.
- Stage 3: two steps of LoRA with rewards over HTTP. What the adapters are on; how far the first ratio is from 1;
  whether a run that stopped after its first step and went on has the same weights to the bit; and how far plain
  transformers' log-probabilities of the merged model are from the policy's. The last column has the same of a run
  in which all parameters learn.

`--table` writes the table into a document in place of the one there, and prints it too.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.tables import measured_on, put
from harness.runs import numbers, weights
from harness.stub_reward_server import StubRewardServer
from harness.tiny_models import VOCAB_SIZE, tiny_tokenizer
from harness.tiny_policies import FAMILIES, POSITIONS, tiny_policy
from plaudit.errors import ConfigError
from plaudit.policy import packing
from plaudit.policy.checks import check_policy
from plaudit.policy.generation import Draws, generate
from plaudit.policy.loading import load_policy
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.policy.texts import end_tokens
from plaudit.policy.uncached_generation import generate_uncached
from plaudit.rewards.settings import RewardSettings
from plaudit.run.metrics import read_metrics
from plaudit.settings.data import DataSettings
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo

TABLE = "policy families"
HEADER = (
    "| family | short, padded | short, packed | full, padded | full, packed | fp32 | sampling | adapters on "
    "| first ratio | resumed | merged | all parameters |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
QUERIES = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16]]
MOST_NAMES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all unless given")
    parser.add_argument("--table", type=Path, metavar="DOCUMENT", help="write the table into this document")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = [f"Measured {measured_on('torch', 'transformers', 'peft')}.", "", *HEADER]
    print(*lines, sep="\n", flush=True)
    with running_stub() as url:
        for family in arguments.families or FAMILIES:
            with tempfile.TemporaryDirectory() as directory:
                lines.append(row(family, Path(directory), url))
            print(lines[-1], flush=True)
    if arguments.table:
        put(arguments.table, TABLE, lines)


@contextlib.contextmanager
def running_stub() -> Iterator[str]:
    """The address of a reward server whose reward is a function of the text."""
    server = StubRewardServer()
    try:
        yield server.url
    finally:
        server.kill()


def row(family: str, directory: Path, url: str) -> str:
    """One family's row of the table, or what is said where it is refused."""
    path = tiny_policy(directory / family, family)
    try:
        policy = load_policy(path, LoraSettings(enabled=False))
        cached = check_policy(policy, family)
    except ConfigError as error:
        said = str(error).partition(": ")[2].removesuffix("; name another model")
        return f"| {family} | refused: {said} |{' |' * 10}"
    plain = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    differences = [
        f"{difference(policy, plain, samples_up_to(longest), packs=packs):.0e}" if policy._packs or not packs else "no"
        for longest in (22, POSITIONS)
        for packs in (False, True)
    ]
    cells = [
        family,
        *differences,
        f"{rounding(plain):.0e}",
        sampling(policy, plain, cached=cached),
        *whole_stage(path, url),
    ]
    return f"| {' | '.join(cells)} |"


def samples_up_to(longest: int) -> Samples:
    """Five texts of random tokens, the longest of so many tokens with its response."""
    generator = torch.Generator().manual_seed(longest)
    lengths = [(longest - 9, 9), (2, 3), (5, 9), (longest // 2, 7), (1, 1)]
    draw = [
        [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in pair] for pair in lengths
    ]
    return Samples.from_lists([query for query, _ in draw], [response for _, response in draw], pad_token_id=0)


def rounding(plain: Any) -> float:
    """The largest difference of plain transformers' log-probabilities in fp32 from those in double precision."""
    exact, worst = copy.deepcopy(plain).double(), 0.0
    exact.set_experts_implementation("eager")  # the faster product of several experts knows no double precision
    try:
        plain_logprobs(exact, samples_up_to(22), 0)
    except RuntimeError:  # XGLM fills its mask with a number that overflows
        return math.nan
    for longest in (22, POSITIONS):
        samples = samples_up_to(longest)
        for index in range(len(samples)):
            once, twice = (plain_logprobs(model, samples, index) for model in (plain, exact))
            worst = max(worst, (once - twice).abs().max().item())
    return worst


@torch.no_grad()
def plain_logprobs(model: Any, samples: Samples, index: int) -> Tensor:
    """Those of one sample's response tokens [T], by a model that gets this text alone, without padding or cache."""
    query = samples.query_ids[index][samples.query_mask[index]]
    response = samples.response_ids[index][samples.mask[index]]
    logits = model(torch.cat([query, response])[None], use_cache=False).logits[0, len(query) - 1 : -1]
    logprobs: Tensor = logits.double().log_softmax(-1).gather(1, response[:, None])[:, 0]
    return logprobs


@torch.no_grad()
def difference(policy: Policy, plain: Any, samples: Samples, *, packs: bool) -> float:
    """The largest, over all response tokens, between the policy's log-probabilities and plain transformers'."""
    kept, packing.FEW_CELLS = packing.FEW_CELLS, 0 if packs else sys.maxsize
    try:
        ours = policy(samples).logprobs
    finally:
        packing.FEW_CELLS = kept
    worst = 0.0
    for index in range(len(samples)):
        expected = plain_logprobs(plain, samples, index)
        worst = max(worst, (ours[index][samples.mask[index]] - expected).abs().max().item())
    return worst


def sampling(policy: Policy, plain: Any, *, cached: bool) -> str:
    """How it samples; and what of that isn't as it should be, if anything."""
    model, tokenizer, length = policy.language_model, tiny_tokenizer(), 24
    drawn = GenerationSettings(min_new_tokens=3, max_new_tokens=length)
    draws = Draws.of(drawn, len(QUERIES), seed=0, step=0)
    draw = generate if cached else generate_uncached

    def responses(draw: Any, settings: GenerationSettings, draws: Draws, queries: list[list[int]]) -> list[list[int]]:
        samples: Samples = draw(model, queries, draws, settings, tokenizer)
        return [ids[real].tolist() for ids, real in zip(samples.response_ids, samples.mask, strict=True)]

    problems = []
    together = responses(draw, drawn, draws, QUERIES)
    alone = [responses(draw, drawn, draws.rows(i, i + 1), [query])[0] for i, query in enumerate(QUERIES)]
    if together != alone:
        problems.append("DIFFERS in a batch")
    if cached and together != responses(generate_uncached, drawn, draws, QUERIES):
        problems.append("DIFFERS without its cache")
    greedy = GenerationSettings(min_new_tokens=length, max_new_tokens=length, top_k=1)
    ours = responses(draw, greedy, Draws.of(greedy, len(QUERIES), seed=0, step=0), QUERIES)
    if ours != [greedy_of_transformers(plain, query, length) for query in QUERIES]:
        problems.append("DIFFERS from transformers' greedy texts")
    if not set(end_tokens(model, tokenizer)) >= set(model.generation_config.eos_token_id):
        problems.append("end tokens are lacking")
    return "; ".join(problems) or ("with its cache" if cached else "without a cache")


def greedy_of_transformers(plain: Any, query: list[int], length: int) -> list[int]:
    """What `transformers.generate` writes behind one prompt, its end token included."""
    ids = torch.tensor([query])
    # Without a cache: some families' own caches differ from the whole text, which is what is scored.
    options = {"max_new_tokens": length, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    written: list[int] = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(query) :].tolist()
    return written


def whole_stage(path: Path, url: str) -> list[str]:
    """The cells of stage 3: what adapters are on, the first ratio less 1, the resumed run, the merged models."""
    config = tiny_run(path, url)
    whole = dataclasses.replace(config, lora=LoraSettings(enabled=False), output_dir=path.with_name("whole"))
    try:
        undisturbed = quietly_run(config)
        stopped = dataclasses.replace(config, output_dir=path.with_name("stopped"))
        quietly_run(dataclasses.replace(stopped, steps=1))
        resumed = quietly_run(dataclasses.replace(stopped, resume="auto"))
        ours, others = weights(undisturbed), weights(resumed)
        same = numbers(undisturbed) == numbers(resumed) and ours.keys() == others.keys()
        same = same and all(torch.equal(ours[name], others[name]) for name in ours)
        trained = load_policy(undisturbed).eval()
        first = read_metrics(undisturbed / "metrics.jsonl")[0]
        drift = first["ppo/policy/ratio_drift"]
        of_adapters = [
            adapted(trained),
            f"{drift:.0e}" if first["objective/kl"] == 0 else f"{drift:.0e}, KL {first['objective/kl']:.0e}",
            "same bits" if same else "DIFFERS",
            merged(undisturbed, trained, path),
        ]
    except Exception as error:
        of_adapters = [failure(error), "", "", ""]
    try:
        directory = quietly_run(whole)
        of_all = merged(directory, load_policy(directory, whole.lora).eval(), path)
    except Exception as error:
        of_all = failure(error)
    return [*of_adapters, of_all]


def merged(run: Path, trained: Policy, path: Path) -> str:
    """How far plain transformers with the merged model is from the policy, which has learnt something."""
    plain, base = (transformers.AutoModelForCausalLM.from_pretrained(p).eval() for p in (run / "merged", path))
    samples = samples_up_to(22)
    learnt = difference(trained, base, samples, packs=False) > 1e-4
    return f"{difference(trained, plain, samples, packs=False):.0e}" + ("" if learnt else ", NOTHING LEARNT")


def adapted(policy: Policy) -> str:
    """The names of the layers that have adapters."""
    names = sorted({name.rpartition(".")[2] for name in policy.model.targeted_module_names})
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")


def failure(error: Exception) -> str:
    """An error as a cell."""
    return f"FAILS: {type(error).__name__}: {' '.join(str(error).split()):.200}".replace("|", "/")


def tiny_run(path: Path, url: str) -> PPOConfig:
    """Two steps of stage 3, with a checkpoint after each and a merged model."""
    texts = path.with_name("texts.csv")
    lines = [f"Film {i} is {'good' if i % 2 else 'bad'}. {'The acting is as expected. ' * 12}" for i in range(40)]
    texts.write_text("text\n" + "\n".join(lines) + "\n")
    return PPOConfig(
        policy=str(path),
        output_dir=path.with_name("run"),
        dataset=DataSettings(str(texts)),
        reward=RewardSettings.of(url=(url,), patience_s=5.0),
        generation=GenerationSettings(min_new_tokens=3, max_new_tokens=10),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-2, ppo_epochs=2),
        steps=2,
        checkpoint_every=1,
        merge=True,
        trackers=(),
    )


def quietly_run(config: PPOConfig) -> Path:
    """The run's directory; its output is thrown away."""
    with Path(os.devnull).open("w") as no, contextlib.redirect_stdout(no), contextlib.redirect_stderr(no):
        return ppo.run(config).output_dir


if __name__ == "__main__":
    main()
