"""Stage 3 against a stub reward server: what it writes, and that a run survives what ends it."""

import dataclasses
import json
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

from harness.runs import TrainerProcess, assert_same_run, single_threaded
from harness.stub_reward_server import StubRewardServer
from harness.tiny_models import tiny_gpt2
from plaudit import cli, errors
from plaudit.errors import ConfigError
from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.policy.loading import load_policy
from plaudit.policy.samples import Rollout, Samples
from plaudit.rewards import RewardRejected, RewardUnavailable
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.run.metrics import read_metrics
from plaudit.run.rollouts import read_rollouts
from plaudit.run.runtime import exclusive
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PenaltySettings, PPOConfig
from plaudit.settings.watch import WatchSettings
from plaudit.stages import ppo


@pytest.fixture
def config(config: PPOConfig) -> PPOConfig:
    return dataclasses.replace(config, steps=4)


@pytest.fixture
def undisturbed(config: PPOConfig, tmp_path: Path) -> Path:
    return ppo.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir


def test_what_it_writes_loads_without_plaudit(config: PPOConfig) -> None:
    directory = ppo.run(dataclasses.replace(config, merge=True)).output_dir
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("This movie was", return_tensors="pt")
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(config.policy), directory
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(directory / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(config.policy)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**ids).logits, merged(**ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(adapted(**ids).logits, base(**ids).logits, atol=1e-4)


def test_the_model_card_has_the_results_and_a_way_to_load_that_works(config: PPOConfig, tmp_path: Path) -> None:
    first = ppo.run(dataclasses.replace(config, steps=2)).output_dir
    # Adapters that go on training belong to the model that they were first put on.
    onward = ppo.run(dataclasses.replace(config, policy=str(first), output_dir=tmp_path / "onward", steps=2)).output_dir
    whole = dataclasses.replace(config, lora=LoraSettings(enabled=False), output_dir=tmp_path / "whole", steps=2)
    for directory in (first, onward, ppo.run(whole).output_dir):
        card = (directory / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        # The hub refuses a directory as the base. How to load it is in the text.
        assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"
        assert "base_model" not in yaml.safe_load(front)
        records = read_metrics(directory / "metrics.jsonl")
        rewards = [record["env/reward_mean"] for record in records]
        assert f"| mean reward | {rewards[0]:.3f} | {rewards[-1]:.3f} |" in body
        names: dict[str, Any] = {}
        exec(body.split("```python\n")[1].split("```")[0], names)
        policy = load_policy(directory, LoraSettings(enabled=False) if directory.name == "whole" else None)
        ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
        with torch.no_grad():
            torch.testing.assert_close(names["model"].eval()(**ids).logits, policy.eval().model(**ids).logits)


def test_every_reward_of_a_step_comes_from_the_service_once(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    ppo.run(config)
    scored = stub_reward_server.state["scored"]
    assert sum(scored.values()) == config.steps * config.ppo.batch_size  # type: ignore[operator]


def test_the_run_starts_at_kl_0_and_its_first_update_at_ratio_1(config: PPOConfig) -> None:
    first = read_metrics(ppo.run(config).output_dir / "metrics.jsonl")[0]
    assert first["objective/kl"] == 0.0
    assert first["ppo/policy/ratio_drift"] < 1e-3


def test_a_resumed_run_is_the_undisturbed_run_to_the_bit(config: PPOConfig, undisturbed: Path) -> None:
    ppo.run(dataclasses.replace(config, steps=2))
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same_run(config.output_dir, undisturbed)


def test_a_service_gone_for_longer_than_the_patience_leaves_a_checkpoint_to_resume_from(
    config: PPOConfig, undisturbed: Path, stub_reward_server: StubRewardServer
) -> None:
    stub_reward_server.script([{"do": "score", "times": 2}, {"do": "status", "status": 503, "times": 1000}])
    with pytest.raises(RewardUnavailable) as error:
        ppo.run(config)
    assert "--resume auto" in " ".join(error.value.__notes__)
    stub_reward_server.script([])
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same_run(config.output_dir, undisturbed)


def test_a_reward_that_is_not_finite_stops_the_run_with_the_exchange_on_disk(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    stub_reward_server.script([{"do": "score"}, {"do": "literal", "text": "NaN"}])
    with pytest.raises(RewardRejected):
        ppo.run(config)
    assert "NaN" in (config.output_dir / "rejected-reward.json").read_text()
    assert (config.output_dir / "checkpoints" / "step-000001" / "manifest.json").exists()


def test_a_loss_that_is_not_finite_leaves_its_samples_on_disk_and_the_checkpoint_before_it(
    config: PPOConfig, undisturbed: Path, stub_reward_server: StubRewardServer
) -> None:
    # A finite reward, whose square in the value loss is not.
    stub_reward_server.script([{"do": "score"}, {"do": "literal", "text": "1e30"}])
    with pytest.raises(NonFiniteUpdate, match=r"loss is inf in step 1, epoch \d, samples") as error:
        ppo.run(config)
    assert "non-finite-step-1.json" in " ".join(error.value.__notes__)
    report = json.loads((config.output_dir / "non-finite-step-1.json").read_text())
    assert [sample["row"] for sample in report["samples"]] == error.value.rows.tolist()
    assert any(sample["score"] > 1e29 for sample in report["samples"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.policy)
    for sample in report["samples"]:
        assert tokenizer.decode(sample["response_tokens"], skip_special_tokens=True) == sample["response"]
        assert len(sample["logprobs"]) == len(sample["values"]) == len(sample["response_tokens"])
    ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same_run(config.output_dir, undisturbed)


def test_another_reward_model_after_a_resume_is_refused_unless_it_is_meant(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    ppo.run(dataclasses.replace(config, steps=2))
    stub_reward_server.set(revision="sha256:other")
    resumed = dataclasses.replace(config, resume="auto")
    with pytest.raises(RewardRejected, match="changed since the checkpoint"):
        ppo.run(resumed)
    ppo.run(dataclasses.replace(resumed, reward=dataclasses.replace(config.reward, allow_revision_change=True)))


def test_a_directory_that_holds_a_run_is_not_started_over(config: PPOConfig) -> None:
    ppo.run(dataclasses.replace(config, steps=1))
    with pytest.raises(ConfigError, match="--resume auto"):
        ppo.run(config)


def test_resuming_with_another_batch_size_says_which_fields_differ(config: PPOConfig) -> None:
    ppo.run(dataclasses.replace(config, steps=1))
    other = dataclasses.replace(config, resume="auto", ppo=dataclasses.replace(config.ppo, batch_size=16))
    with pytest.raises(ConfigError, match=r"ppo\.batch_size: 8 -> 16"):
        ppo.run(other)


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_lives(config: PPOConfig) -> None:
    with exclusive(config.output_dir), pytest.raises(ConfigError, match="in use by another run"):
        ppo.run(config)


def test_penalties_come_off_the_scores_and_not_off_the_rewards_that_are_reported(config: PPOConfig) -> None:
    config = dataclasses.replace(config, steps=1)
    plain = read_metrics(ppo.run(config).output_dir / "metrics.jsonl")[0]
    other = dataclasses.replace(config, output_dir=config.output_dir.with_name("penalised"))
    other = dataclasses.replace(other, penalties=PenaltySettings(missing_eos=2.0, per_token=0.5, free_tokens=1))
    penalised = read_metrics(ppo.run(other).output_dir / "metrics.jsonl")[0]
    assert penalised["env/reward_mean"] == plain["env/reward_mean"] == pytest.approx(plain["ppo/mean_scores"])
    # No response of the first step ends with the end of text: the tiny model gives it 1 in 300.
    expected = plain["env/reward_mean"] - 2.0 - 0.5 * (plain["tokens/responses_len_mean"] - 1)
    assert penalised["ppo/mean_scores"] == pytest.approx(expected, rel=1e-5)


def test_a_response_that_ends_is_spared_the_penalty_for_not_ending() -> None:
    samples = Samples.from_lists([[5], [6]], [[7, 0], [8, 9, 10]], pad_token_id=0)
    zeros = torch.zeros(2, 3)
    rollout = Rollout(
        samples=samples, logprobs=zeros, values=zeros, ref_logprobs=zeros, scores=torch.tensor([1.0, 1.0])
    )
    settings = PenaltySettings(missing_eos=2.0, per_token=0.5, free_tokens=2)
    assert ppo.penalised(rollout, settings, ended=[True, False]).scores.tolist() == [1.0, -1.5]


def test_of_several_rewards_each_is_in_the_metrics_by_its_name(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    length = RewardComponent("length", weight=-0.1, function="tests.trainer.stages.test_ppo:characters")
    stub = dataclasses.replace(config.reward.components[0], name="stub", weight=2.0)
    reward = dataclasses.replace(config.reward, components=(stub, length))
    record = read_metrics(ppo.run(dataclasses.replace(config, reward=reward, steps=1)).output_dir / "metrics.jsonl")[0]
    expected = 2.0 * record["rewards/stub/mean"] - 0.1 * record["rewards/length/mean"]
    assert record["env/reward_mean"] == pytest.approx(expected, rel=1e-5)
    assert record["rewards/length/std"] > 0


def characters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_no_reward_url_says_how_to_get_one(config: PPOConfig) -> None:
    with pytest.raises(ConfigError, match="plaudit-reward"):
        ppo.run(dataclasses.replace(config, reward=RewardSettings()))


def test_a_policy_directory_that_does_not_exist_is_named(config: PPOConfig) -> None:
    with pytest.raises(ConfigError, match="/nowhere/model"):
        ppo.run(dataclasses.replace(config, policy="/nowhere/model"))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_resumes_to_the_bit(config: PPOConfig, tmp_path: Path, kill: signal.Signals) -> None:
    config = dataclasses.replace(config, steps=6)
    undisturbed = single_threaded(ppo.run, dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir
    first = TrainerProcess(config)
    first.wait_for_step(1)
    first.signal(kill)
    code, stderr = first.end()
    if kill == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + kill
        assert "--resume auto" in stderr
    code, stderr = TrainerProcess(config, "--resume", "auto").end()
    assert code == 0, stderr
    assert_same_run(config.output_dir, undisturbed)


def test_a_killed_run_with_groups_and_no_critic_resumes_to_the_bit(config: PPOConfig, tmp_path: Path) -> None:
    grouped = dataclasses.replace(config.ppo, responses_per_prompt=2, advantage_estimator="rloo", kl_loss_coef=0.1)
    watch = WatchSettings(rollouts="all")
    config = dataclasses.replace(config, steps=5, ppo=grouped, watch=watch)
    undisturbed = single_threaded(ppo.run, dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir
    first = TrainerProcess(config)
    first.wait_for_step(1)
    first.signal(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    code, stderr = TrainerProcess(config, "--resume", "auto").end()
    assert code == 0, stderr
    assert_same_run(config.output_dir, undisturbed)
    assert not (config.output_dir / "value_head.safetensors").exists()
    assert "value_head" not in (config.output_dir / "README.md").read_text().partition("```yaml")[0]
    rows = list(read_rollouts(config.output_dir))
    assert len(rows) == 5 * 8
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["response"] != other["response"], "each has draws of its own"


def test_exit_code_75_when_the_patience_runs_out(config: PPOConfig, stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "score", "times": 1}, {"do": "status", "status": 503, "times": 1000}])
    code, stderr = TrainerProcess(config).end()
    assert code == 75
    assert "--resume auto" in stderr


def test_a_run_that_waits_for_its_service_at_the_start_can_be_stopped(
    config: PPOConfig, stub_reward_server: StubRewardServer
) -> None:
    stub_reward_server.set(ready=False)
    waiting = TrainerProcess(
        dataclasses.replace(config, reward=dataclasses.replace(config.reward, patience_s=500.0, request_timeout_s=50.0))
    )
    waiting.wait_for_line("waiting for a reward")
    waiting.signal(signal.SIGINT)
    code, stderr = waiting.end()
    assert code == 130
    assert "plaudit ppo: stopped by SIGINT" in stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_whose_service_takes_the_first_request_and_says_nothing_can_be_stopped(
    config: PPOConfig, number: signal.Signals, code: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reward = dataclasses.replace(config.reward.asking(url), patience_s=500.0, request_timeout_s=500.0)
        waiting = TrainerProcess(dataclasses.replace(config, reward=reward))
        connection, _ = silent.accept()
        with connection:
            waiting.signal(number)
            ended, stderr = waiting.end()
    assert ended == code
    assert f"plaudit ppo: stopped by {number.name}" in stderr


def test_exit_code_65_when_the_service_refuses(config: PPOConfig, stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "wrong_count"}])
    code, _ = TrainerProcess(config).end()
    assert code == 65


def test_other_prompts_and_another_base_are_not_gone_on_with(
    config: PPOConfig, policy_dir: Path, tmp_path: Path
) -> None:
    data, policy = tmp_path / "reviews.csv", tmp_path / "policy"
    data.write_text(Path(config.dataset.data).read_text())
    shutil.copytree(policy_dir, policy)
    config = dataclasses.replace(
        config, policy=str(policy), dataset=dataclasses.replace(config.dataset, data=str(data)), steps=1
    )
    ppo.run(config)
    more = dataclasses.replace(config, steps=2, resume="auto")
    before = data.read_text()
    data.write_text(before.replace("Film 2", "Movie 2"))
    with pytest.raises(ConfigError, match=r"the prompts: \d+ rows, sha256 \w+ then, \d+ rows, sha256 \w+ now"):
        ppo.run(more)
    data.write_text(before)
    tiny_gpt2(seed=1).save_pretrained(policy)
    with pytest.raises(ConfigError, match=r"the policy: \d+ tensors, sha256 \w+ then, \d+ tensors, sha256 \w+ now"):
        ppo.run(more)
    tiny_gpt2().save_pretrained(policy)
    assert ppo.run(more).steps == 2


def test_a_policy_that_cannot_hold_prompt_and_response_is_one_line(config: PPOConfig) -> None:
    with pytest.raises(ConfigError, match=r"has 64 positions, and a prompt of 8 tokens .* needs 72"):
        ppo.run(dataclasses.replace(config, generation=GenerationSettings(max_new_tokens=65)))


def test_a_policy_without_tokenizer_files_is_one_line_and_exit_2(
    config: PPOConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "bare")
    flags = ["--policy", str(tmp_path / "bare"), "--data", config.dataset.data, "--output-dir", str(tmp_path / "out")]
    assert cli.run(["ppo", *flags, "--reward.url", "http://127.0.0.1:9"]) == errors.EXIT_USAGE
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"plaudit ppo: policy='{tmp_path / 'bare'}' has no tokenizer that tells words apart")


def test_rollouts_of_a_resumed_run_are_those_of_the_undisturbed_one(config: PPOConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, watch=WatchSettings(rollouts="all"))
    undisturbed = ppo.run(dataclasses.replace(config, output_dir=tmp_path / "undisturbed")).output_dir
    ppo.run(dataclasses.replace(config, steps=3))
    # As if it had been killed in the third step, after its rollouts were written.
    shutil.rmtree(config.output_dir / "checkpoints" / "step-000003")
    ppo.run(dataclasses.replace(config, resume="auto"))
    rows = list(read_rollouts(config.output_dir))
    assert rows == list(read_rollouts(undisturbed))
    assert [(row["step"], row["row"]) for row in rows] == [(step, row) for step in range(4) for row in range(8)]
    for step, record in enumerate(read_metrics(config.output_dir / "metrics.jsonl")):
        own = [row for row in rows if row["step"] == step]
        assert record["env/reward_mean"] == pytest.approx(sum(row["reward"] for row in own) / 8, abs=1e-6)
        assert record["objective/kl"] == pytest.approx(sum(row["kl"] for row in own) / 8, abs=1e-6)
        assert record["tokens/responses_len_mean"] == sum(row["length"] for row in own) / 8


def test_watching_changes_nothing_of_the_training(config: PPOConfig, undisturbed: Path) -> None:
    ppo.run(dataclasses.replace(config, watch=WatchSettings(rollouts="sampled", rollouts_per_step=3)))
    assert_same_run(config.output_dir, undisturbed)
