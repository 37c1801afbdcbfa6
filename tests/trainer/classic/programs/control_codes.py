"""The control-code notebook's way: a target in front of each query, and a reward that depends on it."""

import sys
import time
from random import choices

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer

from plaudit.classic import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    pipeline,
)

policy, judge, reviews = sys.argv[1:4]
txt_in_len, txt_out_len = 5, 10
config = PPOConfig(
    model_name=policy,
    steps=16,
    learning_rate=1e-3,
    batch_size=8,
    mini_batch_size=4,
    ppo_epochs=2,
    remove_unused_columns=False,
)
np.random.seed(1)

gpt2_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
gpt2_ref_model = create_reference_model(gpt2_model)
gpt2_tokenizer = AutoTokenizer.from_pretrained(config.model_name)
gpt2_tokenizer.pad_token = gpt2_tokenizer.eos_token

dataset = Dataset.from_pandas(pd.read_csv(reviews)[:24]).rename_columns({"text": "review", "label": "sentiment"})
dataset = dataset.map(
    lambda x: {"input_ids": gpt2_tokenizer.encode(" " + x["review"], return_tensors="pt")[0, :txt_in_len]},
    batched=False,
)
dataset = dataset.map(lambda x: {"query": gpt2_tokenizer.decode(x["input_ids"])}, batched=False)
dataset = Dataset.from_dict(dataset[:]).with_format("torch")

ctrl_str = ["[negative]", "[neutral]", "[positive]"]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ctrl_tokens = {s: gpt2_tokenizer.encode(s, return_tensors="pt").squeeze().to(device) for s in ctrl_str}
sentiment_pipe = pipeline("sentiment-analysis", judge, device=device)


def pos_logit_to_reward(logit, task):
    for i in range(len(logit)):
        if task[i] == "[negative]":
            logit[i] = -logit[i]
        elif task[i] == "[neutral]":
            logit[i] = -2 * torch.abs(logit[i]) + 4
    return logit


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


ppo_trainer = PPOTrainer(config, gpt2_model, gpt2_ref_model, gpt2_tokenizer, dataset, data_collator=collator)
generation_kwargs = {
    "min_length": -1,
    "top_k": 0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": gpt2_tokenizer.eos_token_id,
    "max_new_tokens": txt_out_len,
    "eos_token_id": -1,
}

history = []
for _epoch in range(int(np.ceil(config.steps / config.batch_size))):
    for batch in tqdm(ppo_trainer.dataloader):
        logs, game_data = {}, {}
        task_list = choices(ctrl_str, k=config.batch_size)
        game_data["query"] = [t + q for t, q in zip(task_list, batch["query"], strict=True)]
        query_tensors = [
            torch.cat((ctrl_tokens[t], input_ids)) for t, input_ids in zip(task_list, batch["input_ids"], strict=True)
        ]
        response_tensors = []
        for query in query_tensors:
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[-txt_out_len:])
        game_data["response"] = [gpt2_tokenizer.decode(r.squeeze()) for r in response_tensors]

        texts = [q + r for q, r in zip(batch["query"], game_data["response"], strict=True)]
        outputs = sentiment_pipe(texts, return_all_scores=True, function_to_apply="none")
        logits = torch.tensor([output[1]["score"] for output in outputs])
        rewards = pos_logit_to_reward(logits, task_list)

        t = time.time()
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        for cs in ctrl_str:
            own = [r.cpu().numpy() for r, task in zip(rewards, task_list, strict=True) if task == cs]
            stats["env/reward_" + cs.strip("[]")] = np.mean(own) if own else 0.0
        ppo_trainer.log_stats(stats, game_data, rewards)
        history.append(stats)
