"""Choose the reward model's settings of the preset `loop` by its accuracy on held-out pairs of round 1.

    OMP_NUM_THREADS=1 python -m benchmarks.ranking.tune_reward_model

Stage 1 answers prompts with a seed that the experiment doesn't use, and the preset's simulated people rank the answers,
without a ranking service: one person each, three for a fifth of the prompts. Each setting trains on the same rankings,
1,536 unless told otherwise, and is judged on the pairs of the others. No policy is trained, and no win rate is looked
at.

Prints a Markdown table. Whatever was interrupted goes on with the same command.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plaudit.run.annotator import decide
from plaudit.run.storage import write_text
from plaudit.settings import files as presets
from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.data import DataSettings
from plaudit.settings.loop import LoopConfig
from plaudit.settings.policy import LoraSettings
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sample import SampleConfig
from plaudit.settings.supervised import OptimizerSettings
from plaudit.stages import annotate, reward_model, sample

LORA = LoraSettings(r=8, alpha=16, dropout=0.0)
TRIED: dict[str, tuple[OptimizerSettings, LoraSettings | None]] = {
    "all parameters, 3e-4, 3 epochs": (OptimizerSettings(learning_rate=3e-4, batch_size=16, epochs=3), None),
    "all parameters, 1e-4, 3 epochs": (OptimizerSettings(learning_rate=1e-4, batch_size=16, epochs=3), None),
    "all parameters, 1e-3, 3 epochs": (OptimizerSettings(learning_rate=1e-3, batch_size=16, epochs=3), None),
    "all parameters, 3e-4, 1 epoch": (OptimizerSettings(learning_rate=3e-4, batch_size=16, epochs=1), None),
    "all parameters, 1e-3, 1 epoch": (OptimizerSettings(learning_rate=1e-3, batch_size=16, epochs=1), None),
    "all parameters, 2e-3, 2 epochs": (OptimizerSettings(learning_rate=2e-3, batch_size=16, epochs=2), None),
    "adapters, 3e-3, 3 epochs": (OptimizerSettings(learning_rate=3e-3, batch_size=16, epochs=3), LORA),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--training", type=int, default=1536, help="ranked prompts to learn from")
    parser.add_argument("--held-out", type=int, default=768, help="ranked prompts to judge by")
    parser.add_argument("--only", nargs="+", default=list(TRIED), choices=list(TRIED), help="settings to try")
    parser.add_argument("--runs", type=Path, default=Path("runs/tune-reward-model"))
    arguments = parser.parse_args()
    config = presets.load(LoopConfig, Path("presets/loop.yaml"))
    ranked = rankings(config, arguments)
    print("| settings | held-out pairs | 95 % interval | calibration error |")
    print("| --- | ---: | --- | ---: |", flush=True)
    for name in arguments.only:
        pairs = trained(config, arguments, name, ranked)
        low, high = pairs["accuracy_ci95"]
        print(f"| {name} | {pairs['accuracy']:.3f} | {low:.3f} to {high:.3f} | {pairs['calibration_error']:.3f} |")


def rankings(config: LoopConfig, arguments: argparse.Namespace) -> Path:
    """The file of rankings, made unless it is there."""
    answers, file = arguments.runs / "answers.jsonl", arguments.runs / "rankings.jsonl"
    if file.is_file():
        return Path(file)
    sample.run(
        SampleConfig(
            policy=config.policy,
            to=str(answers),
            k=config.sample.k,
            n=arguments.training + arguments.held_out,
            dataset=config.dataset,
            generation=config.generation,
            seed=arguments.seed,
        )
    )
    people = AnnotateConfig(
        judge=config.judge,
        label=config.judge_label,
        annotators=config.simulated.annotators,
        temperature=(config.simulated.temperature,),
        seed=arguments.seed,
    )
    draw = random.Random(arguments.seed)
    with annotate.judging(people) as judge, answers.open(encoding="utf-8", newline="\n") as lines:
        rows = [row for line in lines for row in ranked(json.loads(line), people, judge, draw)]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return Path(file)


def ranked(row: dict[str, Any], people: AnnotateConfig, judge: Any, draw: random.Random) -> Sequence[dict[str, Any]]:
    """One person's ranking of a prompt's answers; three people's of a fifth of the prompts."""
    known: dict[str, float] = {}

    def once(prompt: str, texts: Sequence[str]) -> list[float]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, judge(prompt, new), strict=True) if new else ())
        return [known[text] for text in texts]

    texts = {answer["text"]: answer["text"] for answer in row["answers"]}
    if len(texts) < 2:
        return []
    found = []
    for index in draw.sample(range(people.annotators), 3 if draw.random() < 0.2 else 1):
        habits = annotate.habits_of(people, index)
        ranks = decide(row["prompt"], texts, once, habits, person=annotate.name_of(people, index))
        assert ranks is not None  # the preset's people skip nothing
        found.append({"prompt": row["prompt"], "answers": list(ranks), "ranks": list(ranks.values())})
    return found


def trained(config: LoopConfig, arguments: argparse.Namespace, name: str, ranked: Path) -> dict[str, Any]:
    """The figures on held-out pairs of one setting."""
    output_dir = arguments.runs / name.replace(",", "").replace(" ", "-")
    report = output_dir / "figures.json"
    if not report.is_file():
        optimizer, lora = TRIED[name]
        figures = reward_model.run(
            RewardModelConfig(
                kind="pairwise",
                model=config.policy,
                output_dir=output_dir,
                dataset=DataSettings(held_out_fraction=arguments.held_out / (arguments.training + arguments.held_out)),
                ranked=str(ranked),
                max_length=config.reward_model.max_length,
                optimizer=optimizer,
                lora=LoraSettings(enabled=False) if lora is None else lora,
                allow_chance=True,
                resume="auto",
                seed=arguments.seed,
            )
        )["pairs"]
        write_text(report, json.dumps(dataclasses.asdict(figures), indent=2) + "\n")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
