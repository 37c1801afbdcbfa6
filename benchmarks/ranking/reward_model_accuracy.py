"""How well reward models order answers of several policies, against the judge without noise."""

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.loop import LoopConfig
from plaudit.settings.sample import SampleConfig
from plaudit.stages import annotate, sample
from plaudit.stages.judge_model import load_classifier, scores

PROMPTS = 256


def accuracies(
    config: LoopConfig, reward_models: Mapping[str, Path], policies: Mapping[str, str], directory: Path, *, skip: int
) -> dict[str, dict[str, float]]:
    """By reward model and policy: the share of pairs of the policy's answers that the model orders as the judge does.

    Each policy writes `config.sample.k` answers to each of 256 prompts of the training split, after the first `skip`.
    Pairs that the judge ties are left out; a tie of the reward model counts 1/2.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in reward_models}
    with annotate.judging(AnnotateConfig(judge=config.judge, label=config.judge_label)) as judge:
        for policy, source in policies.items():
            file = directory / "fresh-answers" / f"{policy.replace(' ', '-')}.jsonl"
            sample.run(
                SampleConfig(
                    policy=source,
                    to=str(file),
                    k=config.sample.k,
                    n=PROMPTS,
                    skip=skip,
                    dataset=config.dataset,
                    prompts=config.prompts,
                    generation=config.generation,
                    seed=config.seed,
                )
            )
            with file.open(encoding="utf-8", newline="\n") as lines:
                rows = [json.loads(line) for line in lines]
            answers = [[answer["text"] for answer in row["answers"]] for row in rows]
            judged = [judge(row["prompt"], own) for row, own in zip(rows, answers, strict=True)]
            prompts = [row["prompt"] for row, own in zip(rows, answers, strict=True) for _ in own]
            texts = [text for own in answers for text in own]
            for name, path in reward_models.items():
                model, tokenizer = load_classifier(str(path), num_labels=1, problem_type=None)
                flat = iter(scores(model, tokenizer, prompts, texts, config.reward_model.max_length).tolist())
                found[name][policy] = same_order([[next(flat) for _ in own] for own in answers], judged)
    return found


def same_order(scored: list[list[float]], judged: list[list[float]]) -> float:
    """The share of pairs within each row, apart from those that `judged` ties, that `scored` has in the same order."""
    points = [
        0.5 if a[i] == a[j] else float((a[i] > a[j]) == (b[i] > b[j]))
        for a, b in zip(scored, judged, strict=True)
        for i, j in combinations(range(len(a)), 2)
        if b[i] != b[j]
    ]
    return sum(points) / len(points)
