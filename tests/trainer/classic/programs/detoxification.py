"""The detoxification script's way: a half-precision model, shared layers, an optimizer of one's own."""

from dataclasses import dataclass, field

import pandas as pd
import torch
from datasets import Dataset
from torch.optim import Adam
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from plaudit.classic.core import LengthSampler


@dataclass
class ScriptArguments:
    model_name: str = field(default="gpt-j", metadata={"help": "the model name"})
    toxicity_model: str = field(default="judge", metadata={"help": "the classifier"})
    prompts: str = field(default="prompts.csv", metadata={"help": "a CSV of texts"})
    log_with: str | None = field(default=None, metadata={"help": "a tracker"})
    learning_rate: float = field(default=(1.47e-5) * 2, metadata={"help": "the learning rate"})
    mini_batch_size: int = field(default=4, metadata={"help": "the PPO minibatch size"})
    batch_size: int = field(default=8, metadata={"help": "the batch size"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "accumulated mini-batches"})
    model_save_path: str = field(default="./detoxified", metadata={"help": "the path to save the model"})


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
config = PPOConfig(
    model_name=script_args.model_name,
    learning_rate=script_args.learning_rate,
    log_with=script_args.log_with,
    ppo_epochs=3,
    mini_batch_size=script_args.mini_batch_size,
    batch_size=script_args.batch_size,
    gradient_accumulation_steps=script_args.gradient_accumulation_steps,
)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
input_size = LengthSampler(10, 20)


def tokenize(sample):
    sample["input_ids"] = tokenizer.encode(sample["text"])[: input_size()]
    sample["query"] = tokenizer.decode(sample["input_ids"])
    return sample


dataset = Dataset.from_pandas(pd.read_csv(script_args.prompts)[:20]).map(tokenize, batched=False)
dataset.set_format(type="torch")
dataset = dataset.train_test_split(test_size=0.2, shuffle=False)["train"]


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


set_seed(config.seed)
model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.bfloat16)
model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
ref_model = create_reference_model(model, num_shared_layers=1)
optimizer = Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=config.learning_rate)
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model=ref_model,
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=collator,
    optimizer=optimizer,
)

toxicity_tokenizer = AutoTokenizer.from_pretrained(script_args.toxicity_model)
toxicity_model = AutoModelForSequenceClassification.from_pretrained(script_args.toxicity_model, dtype=torch.float16).to(
    ppo_trainer.accelerator.device
)
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
output_length_sampler = LengthSampler(8, 14)

for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        gen_len = output_length_sampler()
        generation_kwargs["max_new_tokens"] = gen_len
        response = ppo_trainer.generate(query, **generation_kwargs)
        response_tensors.append(response.squeeze()[-gen_len:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]

    toxicity_inputs = toxicity_tokenizer(batch["response"], padding=True, truncation=True, return_tensors="pt").to(
        ppo_trainer.accelerator.device
    )
    logits = toxicity_model(**toxicity_inputs).logits.float()
    rewards = [torch.tensor(output) for output in (logits[:, 0]).tolist()]

    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    if epoch % 100 == 0 and ppo_trainer.accelerator.is_main_process:
        ppo_trainer.save_pretrained(script_args.model_save_path)
