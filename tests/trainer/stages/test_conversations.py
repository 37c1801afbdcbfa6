"""Stage 3 on conversations with fields: what the reward gets, over a resume; its check; answers afterwards."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.runs import assert_same_run, preset_of
from harness.tiny_models import save, tiny_chat_tokenizer, tiny_gpt2
from plaudit import cli
from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.run.metrics import read_metrics
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.generate import GenerateConfig
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import generate, ppo

TOKENIZER: Any = tiny_chat_tokenizer("chatml")
JUDGE = """
import json

def judge(prompts, responses, answer, id):
    with open("seen.jsonl", "a") as file:
        for row in zip(prompts, responses, answer, id):
            file.write(json.dumps(row) + "\\n")
    return [len(response) / 10 + right for response, right in zip(responses, answer)]
"""


def conversation(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {i} and {i}?"}]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PPOConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judge_of_conversations", raising=False)
    (tmp_path / "judge_of_conversations.py").write_text(JUDGE)
    rows = [{"messages": conversation(i), "answer": 2 * i, "id": f"q{i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_gpt2(vocab_size=len(TOKENIZER), n_positions=96)
    model.generation_config.eos_token_id = [0, TOKENIZER.convert_tokens_to_ids("<|im_end|>")]
    return PPOConfig(
        policy=str(save(model, tmp_path / "policy", TOKENIZER)),
        output_dir=tmp_path / "run",
        dataset=DataSettings("rows.jsonl"),
        prompts=PromptSettings(messages_column="messages", system="Add.", fields=("answer", "id")),
        generation=GenerationSettings(max_new_tokens=8, batch_size=3, stop=("e",)),
        reward=RewardSettings.of(function="judge_of_conversations:judge"),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=1),
        steps=4,
        checkpoint_every=1,
        trackers=("tensorboard",),
        log_samples_every=1,
    )


def seen() -> list[Any]:
    path = Path("seen.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return rows


def test_fields_and_conversations_stay_together_over_a_resume(config: PPOConfig, tmp_path: Path) -> None:
    whole = ppo.run(dataclasses.replace(config, output_dir=tmp_path / "whole")).output_dir
    of_the_whole = seen()
    ppo.run(dataclasses.replace(config, steps=2))
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same_run(config.output_dir, whole)
    assert seen() == of_the_whole
    assert len(of_the_whole) == 4 * 8
    for prompt, response, answer, name in of_the_whole:
        assert prompt == [{"role": "system", "content": "Add."}, *conversation(answer // 2)]
        assert name == f"q{answer // 2}"
        assert "e" not in response
        assert "<|im_end|>" not in response
    shares = [record["response/ended_share"] for record in read_metrics(whole / "metrics.jsonl")]
    assert all(0 <= share <= 1 for share in shares)
    assert max(shares) > 0
    table = b"".join(file.read_bytes() for file in (whole / "tensorboard").iterdir())
    assert b"| prompt | response | reward | answer | id |" in table


def test_another_answer_in_the_data_is_another_run(config: PPOConfig) -> None:
    ppo.run(dataclasses.replace(config, steps=1))
    data = Path("rows.jsonl")
    data.write_text(data.read_text().replace('"answer": ', '"answer": 1'))
    with pytest.raises(ConfigError, match=r"what the run reads has changed since: the prompts: \d+ rows"):
        ppo.run(dataclasses.replace(config, resume="auto"))


def test_a_check_says_what_a_run_would_do_and_leaves_nothing(
    config: PPOConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["ppo", "--config", str(preset_of(config)), "--check"]) == 0
    said = capsys.readouterr().out
    assert "'<|im_start|>system\\nAdd.<|im_end|>\\n<|im_start|>user\\nWhat is" in said
    assert "its field answer: " in said
    assert "rewards of 8 responses: mean " in said
    for what in ("time: ", "memory: ", "disk: ", "OK: nothing was trained"):
        assert what in said
    assert not config.output_dir.exists()
    assert cli.run(["ppo", "--config", str(preset_of(config)), "--check", "--prompts.fields", "id"]) == 65
    assert "asks for the field 'answer'" in capsys.readouterr().err
    ppo.run(dataclasses.replace(config, steps=1))
    assert cli.run(["ppo", "--config", str(preset_of(config)), "--check"]) == 2
    assert "holds a run with checkpoints up to step 1" in capsys.readouterr().err
    before = sorted(config.output_dir.rglob("*"))
    assert cli.run(["ppo", "--config", str(preset_of(config)), "--check", "--resume", "auto"]) == 0
    assert sorted(config.output_dir.rglob("*")) == before


def test_a_run_its_merged_model_and_its_checkpoint_give_the_same_answers(
    config: PPOConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ppo.run(dataclasses.replace(config, merge=True, steps=2)).output_dir
    capsys.readouterr()
    questions = ("What is 3 and 3?", "What is 50 and 50?")
    sources = [directory, directory / "merged", directory / "checkpoints" / "step-000002"]
    of_each = [generate.run(GenerateConfig(str(source), questions, seed=5)) for source in sources]
    assert of_each[0] == of_each[1] == of_each[2]
    assert all("e" not in answer.response for answer in of_each[0])  # the run's stop string
    capsys.readouterr()

    conversations = [[{"role": "system", "content": "Add."}, {"role": "user", "content": text}] for text in questions]
    Path("more.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    assert cli.run(["generate", str(directory), "--file", "more.jsonl", "--json", "--seed", "5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == conversations
    assert [(row["response"], row["ended"]) for row in rows] == [(a.response, a.ended) for a in of_each[0]]

    monkeypatch.setattr("sys.stdin", iter([questions[0] + "\n", "\n"]))
    monkeypatch.setattr(generate, "_from_a_terminal", lambda: False)
    assert cli.run(["generate", str(directory), "--seed", "5"]) == 0
    assert capsys.readouterr().out == of_each[0][0].response + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RUN", "x" * 400], r"prompt 1, 'x+, has \d+ tokens; with max_new_tokens=8 the model takes 89: shorten it"),
        (["RUN", ""], "prompt 1 is empty"),
        (["RUN", "a", "--file", "b.txt"], "prompts are given and file=b.txt: leave one out"),
        (["RUN", "--file", "rows.jsonl", "--column", "q"], "rows.jsonl has no column q; it has: messages, answer, id"),
        (["RUN", "a", "--chat", "False", "--system", "b"], "system='b' needs a chat template: give --chat True"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    config: PPOConfig, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    run = Path(config.policy)
    of_run = {"prompts": {"messages_column": "messages"}, "generation": {"max_new_tokens": 8}}
    (run / "run.json").write_text(json.dumps(of_run))
    assert cli.run(["generate", *(str(run) if flag == "RUN" else flag for flag in flags)]) == 2
    assert re.search(message, capsys.readouterr().err)
