"""The arithmetic of the experiment with rounds of ranking, and the policy of a checkpoint."""

from pathlib import Path

import pytest

from benchmarks.ranking.loop_experiment import choose, compared, policy_at, pooled
from benchmarks.ranking.reward_model_accuracy import same_order
from harness.tiny_models import tiny_gpt2_dir
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.policy import LoraSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo


def test_the_pair_with_the_greatest_kl_within_10_percent_is_chosen() -> None:
    one = {5: 1.0, 10: 2.0, 15: 4.0}
    assert choose(one, {5: 1.05, 10: 2.2, 15: 5.0}) == (10, 10)
    assert choose(one, {5: 0.5, 10: 3.7, 15: 9.0}) == (15, 10)
    with pytest.raises(ValueError, match="no two checkpoints have a KL within 10%"):
        choose(one, {5: 0.5})


def test_a_prompts_seeds_are_averaged_before_prompts_are_drawn() -> None:
    mean, (low, high) = pooled([[1.0, 0.0], [0.0, 1.0]])
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    mean, (low, high) = pooled([[1.0, 0.0], [1.0, 0.0]])
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_a_win_counts_1_and_a_tie_one_half() -> None:
    result = compared([3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert result["wins"] == [1.0, 0.5, 1.0, 0.0]
    assert result["win_rate"] == 0.625


def test_accuracy_counts_pairs_of_one_prompt_that_the_judge_tells_apart() -> None:
    # Right, wrong and right of the first prompt; of the second, the model ties the one pair that the judge doesn't.
    assert (
        same_order([[3.0, 1.0, 2.0], [1.0, 1.0, 9.0]], [[3.0, 2.0, 1.0], [1.0, 2.0, 2.0]]) == (1 + 1 + 0 + 0.5 + 1) / 5
    )


@pytest.mark.slow
def test_the_policy_of_the_last_checkpoint_is_the_one_that_the_run_saved(tmp_path: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f"film {i} is a long and quiet story about people\n" for i in range(40)))
    run = tmp_path / "run"
    ppo.run(
        PPOConfig(
            policy=str(tiny_gpt2_dir(tmp_path / "policy")),
            output_dir=run,
            dataset=DataSettings(str(texts)),
            prompts=PromptSettings(min_text_chars=20),
            reward=RewardSettings.of(function="harness.judges:vowels"),
            lora=LoraSettings(r=2),
            ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-2, ppo_epochs=1),
            steps=2,
            checkpoint_every=1,
            trackers=(),
            device="cpu",
        )
    )
    first, last = (Path(policy_at(run, step, tmp_path / str(step))) for step in (1, 2))
    names = ("adapter_model.safetensors", "value_head.safetensors")
    assert all((last / name).read_bytes() == (run / name).read_bytes() for name in names)
    assert all((first / name).read_bytes() != (run / name).read_bytes() for name in names)
