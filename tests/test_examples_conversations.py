"""The commands in examples/conversations/README.md, as they stand there, on tiny data."""

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.conversations import make_data
from harness.reward_service import RewardService
from plaudit import cli
from plaudit.policy.texts import named_tokens

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "conversations"
SIZES = {"TALKS": 60, "PREFERENCES": 60, "HELD_OUT": 12, "TRAIN": 24, "TEST": 8}
FEWER = {
    "sft": ["--eval-texts", "4", "--optimizer.learning-rate", "0.003"],
    "reward-model": ["--allow-chance"],
    "ppo": ["--steps", "2", "--ppo.batch-size", "8", "--ppo.mini-batch-size", "4", "--ppo.ppo-epochs", "1"],
    "evaluate": ["--n-prompts", "6"],
}
URL = "http://127.0.0.1:8000"


def commands() -> list[list[str]]:
    [block] = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in SIZES.items():
        monkeypatch.setattr(make_data, name, count)
    for file in (*EXAMPLE.glob("*.yaml"), *EXAMPLE.glob("*.jinja")):
        (tmp_path / file.name).write_text(file.read_text())
    return tmp_path


def test_the_commands_of_the_readme_run_from_data_to_an_answer(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: dict[str, str] = {}
    service: RewardService | None = None
    try:
        for command in commands():
            match command:
                case ["cd", _] | ["kill", _]:
                    continue
                case ["python", "make_data.py"]:
                    make_data.main(Path("data"))
                case ["plaudit-reward", "--model", model, *flags, "--port", "8000", "&"]:
                    service = RewardService(model, *flags)
                case ["plaudit", name, *flags]:
                    url = URL if service is None else service.url
                    arguments = [name, *(url if flag == URL else flag for flag in flags), *FEWER.get(name, [])]
                    assert cli.run(arguments) == 0, capsys.readouterr().err
                    said[f"{name} --check" if "--check" in flags else name] = capsys.readouterr().out
                case _:
                    raise AssertionError(command)
        assert service is not None
        _the_tokens_are_those_of_the_templates(said, service)
    finally:
        if service is not None:
            service.kill()
    judged = json.loads(Path("runs/judge-evaluation/judge.json").read_text())
    assert judged["revision"] == service.announced["revision"]
    rows = [json.loads(line) for line in Path("runs/judge-evaluation/judge-scores.jsonl").read_text().splitlines()]
    assert len(rows) == SIZES["HELD_OUT"]
    assert "OK: nothing was trained" in said["ppo --check"]
    assert said["generate"].strip()


def _the_tokens_are_those_of_the_templates(said: dict[str, str], service: RewardService) -> None:
    """What `ppo --check` and the judge's ready line show is what transformers makes of the same conversation."""
    policy, judge = (AutoTokenizer.from_pretrained(f"runs/{name}") for name in ("sft", "judge"))
    assert policy.chat_template == (EXAMPLE / "policy.jinja").read_text()
    assert judge.chat_template == (EXAMPLE / "judge.jinja").read_text()
    asked = [json.loads(line)["messages"] for line in Path("data/prompts/train.jsonl").read_text().splitlines()]
    system = {"role": "system", "content": make_data.SYSTEM}
    shown = re.search(r"its tokens: (.*)", said["ppo --check"])
    assert shown is not None
    assert shown[1] in [
        named_tokens(policy, policy.apply_chat_template([system, *m], add_generation_prompt=True)["input_ids"])
        for m in asked
    ]
    plain = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "story"}]
    assert service.announced["conversation"] == judge.convert_ids_to_tokens(
        judge.apply_chat_template(plain)["input_ids"]
    )
    # Stages 1 and 2 print an example each, and those are templates' tokens too.
    of_training = (
        ("sft", "an example", policy, _talks()),
        ("reward-model", "an answer as the judge reads it", judge, _answered()),
    )
    for name, what, tokenizer, conversations in of_training:
        shown = re.search(rf"{what}, \d+ tokens: (.*)", said[name])
        assert shown is not None
        expected = [named_tokens(tokenizer, tokenizer.apply_chat_template(c)["input_ids"]) for c in conversations]
        assert shown[1] in expected


def _talks() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in Path("data/talks.jsonl").read_text().splitlines()]


def _answered() -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in Path("data/preferences.jsonl").read_text().splitlines()]
    return [[*row["prompt"], *row[which]] for row in rows for which in ("chosen", "rejected")]
