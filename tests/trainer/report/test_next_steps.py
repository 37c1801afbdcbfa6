"""The commands that a finished stage suggests: they parse, and carry on the stage's data, prompts and rewards."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from harness.own_reviews import write_reviews
from plaudit import cli
from plaudit.report.next_steps import after
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.demo import DemoConfig
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.export import ExportConfig
from plaudit.settings.generate import GenerateConfig
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig

DATA = DataSettings("my reviews.csv", text_column="review", held_out_fraction=0.2)


def commands(config: object, file: Path | None = None) -> list[list[str]]:
    lines = after(config, file).splitlines()[2:]
    assert all(line.startswith("  ") for line in lines)
    return [shlex.split(line, comments=True) for line in lines]


def test_after_stage_1_come_a_reward_model_and_ppo_on_the_same_data() -> None:
    judge, ppo = commands(SFTConfig(dataset=DATA, output_dir=Path("runs/my sft")))
    assert cli.parse(judge[1], judge[2:]).dataset == DATA
    parsed = cli.parse(ppo[1], ppo[2:])
    assert (parsed.policy, parsed.dataset) == ("runs/my sft", DATA)
    assert parsed.reward.says_whom_to_ask


def test_after_a_reward_model_it_is_served_with_its_last_label() -> None:
    serve, ppo = commands(RewardModelConfig(dataset=DATA, output_dir=Path("runs/judge")))
    assert serve == ["plaudit-reward", "--model", "runs/judge", "--label", "POSITIVE", "--port", "8000", "&"]
    assert cli.parse(ppo[1], ppo[2:]).dataset == DATA
    ranked = RewardModelConfig(kind="pairwise", ranked="ranked.jsonl")
    assert "--label" not in commands(ranked)[0]


def test_after_ppo_the_evaluation_has_its_prompts_its_sampling_and_its_reward() -> None:
    config = PPOConfig(
        output_dir=Path("runs/mine"),
        dataset=DATA,
        prompts=PromptSettings(column="question", fields=("answer", "id")),
        generation=GenerationSettings(max_new_tokens=64, stop=("User:",), draw_lengths=False),
        reward=RewardSettings.of(url=("http://a:1", "http://b:2"), label="GOOD"),
    )
    evaluate, generate, export = commands(config)
    parsed: EvaluateConfig = cli.parse(evaluate[1], evaluate[2:])
    assert parsed.after == "runs/mine"
    for name in ("dataset", "prompts", "generation", "reward"):
        assert getattr(parsed, name) == getattr(config, name)
    told: GenerateConfig = cli.parse(generate[1], generate[2:])
    assert told.run == "runs/mine"
    exported: ExportConfig = cli.parse(export[1], export[2:])
    assert exported.source == "runs/mine"


def test_several_rewards_need_their_settings_file_again() -> None:
    two = RewardSettings((RewardComponent(function="a:b"), RewardComponent(name="other", function="a:c")))
    evaluate = commands(PPOConfig(reward=two))[0]
    assert evaluate[-2:] == ["--config", "FILE"]


def test_a_file_for_all_stages_is_all_that_the_next_command_needs(tmp_path: Path) -> None:
    assert cli.run(["init", str(write_reviews(tmp_path / "r.csv")), "--output", str(tmp_path / "all.yaml")]) == 0
    file = tmp_path / "all.yaml"
    for config in (SFTConfig(), RewardModelConfig(), PPOConfig()):
        suggested = [command for command in commands(config, file) if "--config" in command]
        assert suggested
        for command in suggested:
            assert command[2:] == ["--config", str(file)]
            cli.parse(command[1], command[2:])
    one_stage = tmp_path / "ppo.yaml"
    one_stage.write_text("steps: 3\n")
    assert "--config" not in commands(PPOConfig(), one_stage)[0][:3]


@pytest.mark.parametrize(
    ("address", "port"), [("http://localhost:9123", "9123"), ("https://judge.example.org:9123", "8000")]
)
def test_a_reward_model_is_served_where_the_settings_file_lets_ppo_look(
    tmp_path: Path, address: str, port: str
) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(f"stages:\n  ppo: {{reward: {{url: [{address}]}}}}\n  reward-model: {{}}\n")
    serve = commands(RewardModelConfig(), file)[0]
    assert serve[serve.index("--port") + 1] == port


@pytest.mark.parametrize("config", [EvaluateConfig(), DemoConfig()])
def test_at_the_end_there_is_a_report_to_open(config: EvaluateConfig | DemoConfig) -> None:
    first, *others = commands(config)
    assert first == ["open", str(config.output_dir / "report.html")]
    for command in others:
        cli.parse(command[1], command[2:])


def test_nothing_follows_a_dry_run_or_an_answer() -> None:
    assert after(dataclasses.replace(PPOConfig(), check=True)) == ""
    assert after(GenerateConfig()) == ""
