"""The demo: a reward service in a separate process, PPO with its rewards over HTTP, and an evaluation."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plaudit import demo_models
from plaudit.errors import ConfigError
from plaudit.policy.reading import settle
from plaudit.run.service_process import reward_service
from plaudit.settings import files
from plaudit.settings.demo import DemoConfig
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sft import SFTConfig
from plaudit.stages import evaluate, ppo


def run(config: DemoConfig) -> None:
    """Train, evaluate and report. `stages=all` first trains both models from scratch."""
    began = time.monotonic()
    training = files.load(PPOConfig, config.preset)
    policy, reward_model = training.policy, config.reward_model
    if config.stages == "all":
        policy, reward_model = _train_models(config)
    if not config.reward_url:
        _require_models(policy=policy, reward_model=reward_model)

    with _reward_urls(config, reward_model) as urls:
        training = dataclasses.replace(
            training,
            policy=policy,
            output_dir=config.output_dir / "ppo",
            steps=config.steps or training.steps,
            # An interrupted demo continues. With new models from scratch, old checkpoints are useless.
            resume="auto" if config.stages == "ppo" else None,
            reward=training.reward.asking(*urls),
            seed=config.seed,
        )
        ppo.run(training)
        trained = time.monotonic()
        evaluate.by_rewards(
            EvaluateConfig(
                policy=policy,
                after=str(training.output_dir),
                output_dir=config.output_dir,
                dataset=training.dataset,
                prompts=training.prompts,
                generation=training.generation,
                reward=training.reward,
                n_prompts=config.n_prompts,
                seed=config.seed,
            )
        )
    print(f"Trained in {trained - began:.0f} s, judged in {time.monotonic() - trained:.0f} s.")


def _require_models(**directories: str) -> None:
    for what, directory in directories.items():
        settle(directory)
        if not (Path(demo_models.resolve(directory)) / "config.json").is_file():
            raise ConfigError(f"the {what.replace('_', ' ')} {directory!r} is not a model directory")


@contextmanager
def _reward_urls(config: DemoConfig, reward_model: str) -> Iterator[tuple[str, ...]]:
    """The given services, or one that is started for the block."""
    if config.reward_url:
        yield config.reward_url
        return
    print("Starting the reward service in a process of its own ...", flush=True)
    # Each text in a pass of its own: a batch's company would change a reward's last bits, and a run amplifies them.
    with reward_service(
        reward_model, config.output_dir, ready_timeout_s=config.ready_timeout_s, flags=("--deterministic",)
    ) as url:
        print(f"It answers at {url}.", flush=True)
        yield (url,)


def _train_models(config: DemoConfig) -> tuple[str, str]:
    """Run stages 1 and 2 in minutes: the embedded models' presets with fewer steps."""
    from plaudit.stages import reward_model, sft

    sft_config = files.load(SFTConfig, Path("imdb-gpt2-mini"))
    sft_config = dataclasses.replace(
        sft_config,
        optimizer=dataclasses.replace(sft_config.optimizer, max_steps=config.from_scratch_steps),
        output_dir=config.output_dir / "sft",
        resume="auto",
    )
    judge_config = files.load(RewardModelConfig, Path("imdb-distilbert-mini"))
    judge_config = dataclasses.replace(
        judge_config,
        optimizer=dataclasses.replace(judge_config.optimizer, max_steps=config.from_scratch_steps),
        output_dir=config.output_dir / "reward-model",
        resume="auto",
    )
    print("Stage 1: supervised fine-tuning", flush=True)
    sft.run(sft_config)
    print("Stage 2: reward model", flush=True)
    reward_model.run(judge_config)
    return str(sft_config.output_dir), str(judge_config.output_dir)
