"""TRL's own trainers against a reward server."""

import asyncio
from pathlib import Path

import pytest

from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.rewards import RemoteReward, RewardRejected
from plaudit.rewards.remote_reward import contents
from plaudit.rewards.settings import RewardSettings


def settings(server: StubRewardServer) -> RewardSettings:
    return RewardSettings.of(url=(server.url,), check_order=False, patience_s=30.0, name="remote")


def test_prompts_and_completions_are_scored_in_order(stub_reward_server: StubRewardServer) -> None:
    reward = RemoteReward(settings(stub_reward_server))
    try:
        scores = asyncio.run(
            reward(prompts=["a", "b"], completions=["c", "d"], completion_ids=[[1], [2]], other=[1, 2])
        )
        assert scores == [stub_reward("a", "c"), stub_reward("b", "d")]
    finally:
        reward.close()


def test_conversations_become_text_by_a_function_of_ones_own(stub_reward_server: StubRewardServer) -> None:
    reward = RemoteReward(settings(stub_reward_server), render=contents)
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    try:
        scores = asyncio.run(reward(prompts=[prompt], completions=[[{"role": "assistant", "content": "Hello"}]]))
        assert scores == [stub_reward("Be kind.\nHi", "Hello")]
    finally:
        reward.close()


def test_a_message_in_parts_is_its_text_and_what_is_no_text_is_refused() -> None:
    parts = [{"type": "text", "text": "so "}, {"type": "text", "text": "good"}]
    assert contents([{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]) == "a\nso good"
    for content in (None, [], [{"type": "image", "image": "film.png"}], ["good"], 3):
        with pytest.raises(RewardRejected, match="only text can be judged"):
            contents([{"role": "assistant", "content": content}])


def test_a_failed_reward_is_an_exception_and_not_none(stub_reward_server: StubRewardServer) -> None:
    reward = RemoteReward(settings(stub_reward_server))
    stub_reward_server.script([{"do": "wrong_count"}])
    try:
        with pytest.raises(RewardRejected):
            asyncio.run(reward(prompts=["a", "b"], completions=["c", "d"]))
    finally:
        reward.close()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls transformers and peft by older names
def test_trls_rloo_trainer_takes_two_steps_on_remote_rewards(
    stub_reward_server: StubRewardServer, tmp_path: Path
) -> None:
    import torch
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from harness.tiny_models import tiny_gpt2_dir

    model_dir = tiny_gpt2_dir(tmp_path / "model")
    reward = RemoteReward(settings(stub_reward_server))
    config = RLOOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    prompts = Dataset.from_dict({"prompt": ["the movie was", "a story of", "this film is", "I love the"] * 2})
    try:
        trainer = RLOOTrainer(str(model_dir), reward, args=config, train_dataset=prompts)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
    finally:
        reward.close()
    rewards = [record["rewards/remote/mean"] for record in trainer.state.log_history if "rewards/remote/mean" in record]
    scored = stub_reward_server.state["scored"]
    assert sum(scored.values()) == 8
    expected = [stub_reward(*key.split("|", 1)) * times for key, times in scored.items()]
    assert sum(rewards) / 2 == pytest.approx(sum(expected) / 8, abs=1e-5)
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
