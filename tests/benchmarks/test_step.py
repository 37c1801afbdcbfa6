"""The benchmark of the PPO step: who takes part, what is read from their output, and the comparisons."""

import argparse
import stat
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.ppo import rounds, step
from benchmarks.ppo.models import SMALL_JUDGE, SMALL_POLICY, Models, judge_of_tokens, models_of
from benchmarks.ppo.rounds import Contestant

LINES = """
{'eps': 3, 'objective/kl': 0.0}
{"step": 9.0, "samples": 128, "peak_mib": 700.0}
{"step": 2.0, "samples": 128, "peak_mib": 710.0}
done
{"step": 4.0, "samples": 128, "peak_mib": 705.0}
"""


def taken(*seconds: float, samples: int = 128) -> rounds.Steps:
    phases = {"generate": 0.5, "reward": 0.0, "evaluate": 0.25, "update": 0.25}
    return [{**phases, "step": s, "processor": 2 * s, "samples": samples, "tokens": 1280, "peak_mib": 600 + s}
            for s in seconds]  # fmt: skip


def arguments(**given: object) -> argparse.Namespace:
    options = {
        "steps": 2,
        "batch_size": 128,
        "chunk": 128,
        "lora_r": 16,
        "device": "cpu",
        "bf16": False,
        "compile": False,
        "classic_python": "old/python",
        "classic_api": True,
        "queries": ["one", "batch"],
        "parameters": ["all", "lora"],
        "trl_python": "new/python",
        "response_length": 10,
    }
    return argparse.Namespace(**(options | given))


def test_steps_are_the_json_lines_and_the_first_of_several_is_a_warm_up() -> None:
    steps = rounds.steps_of(LINES)
    assert [s["step"] for s in steps] == [9.0, 2.0, 4.0]
    assert [s["step"] for s in rounds.counted(steps)] == [2.0, 4.0]
    assert rounds.counted(steps[:1]) == steps[:1]
    assert rounds.median([rounds.counted(steps)]) == {"step": 3.0, "samples": 128, "peak_mib": 710.0}


def test_a_ratio_is_that_of_the_samples_a_second_in_the_same_round() -> None:
    # Round 1: 128 in 1 s against 128 in 3 s. Round 2: 128 in 2 s against 64 in 5 s. Round 3: 4 s against 4 s.
    ours = [taken(1.0), taken(2.0), taken(4.0)]
    theirs = [taken(3.0), taken(5.0, samples=64), taken(4.0)]
    assert rounds.ratios(ours, theirs, "step") == [3.0, 5.0, 1.0]
    a, b = Contestant("a", "", "", (), rivals=("b",)), Contestant("b", "", "", ())
    *_, row = rounds.ratio_table([a, b], {"a": ours, "b": theirs})
    assert row == "| a | b | **3.00** (3.00, 5.00, 1.00) | **3.00** (3.00, 5.00, 1.00) |"


def test_a_row_has_the_medians_of_all_rounds_the_largest_peak_and_the_services_beside_it() -> None:
    turns = [taken(1.0, 2.0), taken(6.0)]
    served = [[{**s, "service_peak_mib": 430.0} for s in steps] for steps in turns]
    *_, alone, both = rounds.table({"a": turns, "b": served})
    assert alone == "| a | 0.500 | 0.000 | 0.250 | 0.250 | 2.000 | 4.000 | 1280 | 64.0 | 606 |"
    assert both.endswith("| 64.0 | 606 + 430 |")


def test_who_takes_part_and_with_whom_each_is_compared(tmp_path: Path) -> None:
    def names(**given: object) -> list[str]:
        found = step.contestants(arguments(**given), tmp_path / "p.json", tmp_path, Models(SMALL_POLICY, SMALL_JUDGE))
        known = {contestant.name for contestant in found}
        assert len(known) == len(found)
        assert all(rival in known for contestant in found for rival in contestant.rivals)
        assert all(c.rivals or c.name.startswith("trl") for c in found if given.get("classic_python", True))
        return [contestant.name for contestant in found]

    assert names(classic_python=None, classic_api=False, trl_python=None) == ["plaudit"]
    assert names(classic_api=False, trl_python=None, queries=["batch"], parameters=["lora"]) == [
        "plaudit",
        "trl 0.11.4, batched, same LoRA",
    ]
    assert names(classic_python=None, trl_python=None, queries=["one"], parameters=["all"]) == [
        "plaudit",
        "plaudit.classic, as published",
    ]
    assert len(names()) == 1 + 8 + 3


def test_rivals_get_the_same_models_lengths_and_adapters(tmp_path: Path) -> None:
    found = step.contestants(arguments(), tmp_path / "p.json", tmp_path, Models(SMALL_POLICY, SMALL_JUDGE))
    flags = {c.name: dict(zip(c.flags, [*c.flags[1:], ""], strict=True)) for c in found}
    for name, given in flags.items():
        assert (given["--policy"], given["--batch-size"], given["--steps"]) == (str(SMALL_POLICY), "128", "2"), name
        assert given["--lora-r"] == ("0" if name.endswith(("as published", "batched")) else "16"), name
        assert ("--batched" in given) == ("batched" in name), name
    theirs = flags["trl 1.12.0, same LoRA"]
    for what, value_model in (("judge of tokens", "shared"), ("judge of tokens, same value model", "judge-of-tokens")):
        ours = flags[f"plaudit, {what}"]
        assert [ours[f] for f in ("--reward-model", "--response-length")] == [
            theirs[f] for f in ("--reward-model", "--response-length")
        ]
        assert ours["--value-model"].endswith(value_model)


def test_the_judge_of_tokens_has_the_policys_vocabulary_and_the_other_judges_blocks(tmp_path: Path) -> None:
    models = models_of("demo", tmp_path)
    path = judge_of_tokens(models, tmp_path / "judge")
    judge = AutoModelForSequenceClassification.from_pretrained(path)
    blocks = sum(p.numel() for p in judge.transformer.h.parameters())
    other = AutoModelForSequenceClassification.from_pretrained(models.judge)
    assert blocks == sum(p.numel() for p in other.distilbert.transformer.parameters())
    text = "A wonderful film."
    ids = [AutoTokenizer.from_pretrained(p)(text)["input_ids"] for p in (path, models.policy)]
    assert ids[0] == ids[1]
    assert judge(input_ids=torch.tensor([ids[0]])).logits.shape == (1, 1)


def program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_an_environment_without_the_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    here = version("trl")
    rounds.require_trl(sys.executable, here, "--trl-python", step.TRL)
    with pytest.raises(
        SystemExit, match=rf"--trl-python .* has trl {here}: the docstring of .*trl_recipe says .* 9\.9"
    ):
        rounds.require_trl(sys.executable, "9.9", "--trl-python", step.TRL)
    with pytest.raises(SystemExit, match=r"--classic-python .* has no trl: .*classic_recipe"):
        rounds.require_trl(program(tmp_path / "bare", "exit 1"), "0.11.4", "--classic-python", step.CLASSIC)
    with pytest.raises(SystemExit, match=r"nowhere can't be run \(No such file or directory\)"):
        rounds.require_trl("nowhere", "0.11.4", "--classic-python", step.CLASSIC)


def test_a_contestant_that_fails_or_says_nothing_ends_the_benchmark_with_its_last_words(tmp_path: Path) -> None:
    broken = program(tmp_path / "broken", "echo out of luck >&2; exit 3")
    with pytest.raises(SystemExit, match=r"a failed with code 3:\nout of luck"):
        rounds.turn(Contestant("a", broken, "m", ()))
    with pytest.raises(SystemExit, match="a failed with code 0"):
        rounds.turn(Contestant("a", program(tmp_path / "silent", "echo nothing"), "m", ()))


@pytest.mark.slow
def test_one_step_of_each_of_our_programs_prints_what_the_tables_need(tmp_path: Path) -> None:
    given = arguments(steps=1, batch_size=4, chunk=4, classic_python=None, queries=["batch"], parameters=["lora"])
    (tmp_path / "p.json").write_text("[[12, 40], [7, 9, 11], [300, 5, 18], [44, 45, 46, 47]]")
    everybody = step.contestants(given, tmp_path / "p.json", tmp_path, models_of("demo", tmp_path))
    ours = [c for c in everybody if c.python == sys.executable]
    assert [c.name for c in ours][:2] == ["plaudit", "plaudit.classic, batched, same LoRA"]
    found = {c.name: [rounds.turn(c)] for c in ours if "value model" not in c.name}
    for name, ((only,),) in found.items():
        parts = sum(only[phase] for phase in ("generate", "reward", "evaluate", "update"))
        assert parts == pytest.approx(only["step"]), name
        assert only["samples"] == 4
        assert 4 <= only["tokens"] <= 4 * 16
        assert only["peak_mib"] > 100
    (((fixed,),),) = (found["plaudit, judge of tokens"],)
    assert fixed["tokens"] == 4 * 10
    assert len([*rounds.table(found), *step.roofline(found["plaudit"], 1e11)]) == 2 + 3 + 2 + 3
