"""The sentiment notebook's way: two full models, one query at a time, then before against after in a data frame."""

import sys

import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer

from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, pipeline
from plaudit.classic.core import LengthSampler

policy, judge, reviews = sys.argv[1:4]
config = PPOConfig(model_name=policy, learning_rate=1e-3, batch_size=8, mini_batch_size=8, ppo_epochs=2)
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}


def build_dataset(config, input_min_text_length=2, input_max_text_length=8):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    ds = Dataset.from_pandas(pd.read_csv(reviews)).rename_columns({"text": "review"})
    ds = ds.filter(lambda row: len(row["review"]) > 200, batched=False).select(range(20))
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds


dataset = build_dataset(config)


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline("sentiment-analysis", model=judge, device=device)

output_length_sampler = LengthSampler(4, 16)
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}


def positive(texts):
    outputs = sentiment_pipe(texts, **sent_kwargs)
    return [item["score"] for output in outputs for item in output if item["label"] == "POSITIVE"]


for _epoch, batch in enumerate(tqdm(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        generation_kwargs["max_new_tokens"] = output_length_sampler()
        query_response = ppo_trainer.generate(query, **generation_kwargs).squeeze()
        response_len = len(query_response) - len(query)
        response_tensors.append(query_response[-response_len:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    rewards = [torch.tensor(score) for score in positive(texts)]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)

dataset.set_format("pandas")
df_batch = dataset[:].sample(16)
game_data = {"query": df_batch["query"].tolist()}
response_tensors_ref, response_tensors = [], []
for ids in df_batch["input_ids"].tolist():
    query = torch.tensor(ids)
    gen_len = output_length_sampler()
    generation_kwargs["max_new_tokens"] = gen_len
    for own, answers in ((ref_model, response_tensors_ref), (model, response_tensors)):
        output = own.generate(query.unsqueeze(dim=0).to(device), **generation_kwargs).squeeze()
        answers.append(output[len(query) :])
game_data["response (before)"] = [tokenizer.decode(r) for r in response_tensors_ref]
game_data["response (after)"] = [tokenizer.decode(r) for r in response_tensors]
for when in ("before", "after"):
    answers = game_data[f"response ({when})"]
    game_data[f"rewards ({when})"] = positive([q + r for q, r in zip(game_data["query"], answers, strict=True)])
df_results = pd.DataFrame(game_data)
print(df_results[["rewards (before)", "rewards (after)"]].mean(), df_results[["rewards (before)"]].median())

model.save_pretrained(sys.argv[4])
tokenizer.save_pretrained(sys.argv[4])
