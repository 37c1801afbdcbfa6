"""The best-of-n notebook's way: a base model, a tuned one, and the best of several samples of the base."""

import sys

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from plaudit.classic import AutoModelForCausalLMWithValueHead, pipeline
from plaudit.classic.core import LengthSampler
from plaudit.classic.extras import BestOfNSampler

policy, judge, reviews = sys.argv[1:4]
N_BEST_OF = 4
device = 0 if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLMWithValueHead.from_pretrained(policy)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(policy)
reward_pipe = pipeline("sentiment-analysis", model=judge, device=device)
tokenizer = AutoTokenizer.from_pretrained(policy)
tokenizer.pad_token = tokenizer.eos_token
model.to(device)
ref_model.to(device)

input_size = LengthSampler(2, 8)
dataset = Dataset.from_pandas(pd.read_csv(reviews)[:20])
dataset = dataset.map(lambda row: {"input_ids": tokenizer.encode(row["text"])[: input_size()]}, batched=False)
dataset = dataset.map(lambda row: {"query": tokenizer.decode(row["input_ids"])}, batched=False)

gen_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id}
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16}
output_length_sampler = LengthSampler(4, 16)

bs = 6
dataset.set_format("pandas")
df_batch = dataset[:].sample(bs)
output_data = {"query": df_batch["query"].tolist()}
query_tensors = [list(ids) for ids in df_batch["input_ids"].tolist()]
responses_ref, responses, responses_best_of = [], [], []
for i in range(bs):
    gen_len = output_length_sampler()
    query = torch.tensor(query_tensors[i])
    output = ref_model.generate(query.unsqueeze(dim=0).to(device), max_new_tokens=gen_len, **gen_kwargs).squeeze()
    responses_ref.append(tokenizer.decode(output))
    output = model.generate(query.unsqueeze(dim=0).to(device), max_new_tokens=gen_len, **gen_kwargs).squeeze()
    responses.append(tokenizer.decode(output))
    queries = query.repeat((N_BEST_OF, 1))
    output = ref_model.generate(queries.to(device), max_new_tokens=gen_len, **gen_kwargs).squeeze()
    responses_best_of.append(tokenizer.batch_decode(output))

scores_ref = [output[0]["score"] for output in reward_pipe(responses_ref, **sent_kwargs)]
scores = [output[0]["score"] for output in reward_pipe(responses, **sent_kwargs)]
scores_best_of = [
    torch.tensor([output[0]["score"] for output in reward_pipe(answers, **sent_kwargs)])
    for answers in responses_best_of
]
output_data["scores (ref)"] = scores_ref
output_data["scores (RLHF)"] = scores
output_data["response (best_of)"] = [responses_best_of[i][a.argmax().item()] for i, a in enumerate(scores_best_of)]
output_data["scores (best_of)"] = [a.max().item() for a in scores_best_of]
df_results = pd.DataFrame(output_data)


def queries_to_scores(list_of_strings):
    return [output[0]["score"] for output in reward_pipe(list_of_strings, **sent_kwargs)]


best_of_n = BestOfNSampler(
    model, tokenizer, queries_to_scores, length_sampler=output_length_sampler, sample_size=N_BEST_OF, n_candidates=2
)
chosen = best_of_n.generate([torch.tensor(ids) for ids in query_tensors], device=device, **gen_kwargs)
