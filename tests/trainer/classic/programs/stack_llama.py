"""StackLLaMA's way: adapters on an 8-bit base, Adafactor, a length for each response, a baseline, saved on the way."""

from dataclasses import dataclass, field

import pandas as pd
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import Adafactor, AutoTokenizer, HfArgumentParser

from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, pipeline, set_seed
from plaudit.classic.core import LengthSampler

tqdm.pandas()


@dataclass
class ScriptArguments:
    model_name: str | None = field(default="", metadata={"help": "the model name"})
    tokenizer_name: str | None = field(default="", metadata={"help": "the tokenizer name"})
    reward_model_name: str | None = field(default="", metadata={"help": "the reward model name"})
    questions: str | None = field(default="", metadata={"help": "a CSV of texts"})
    log_with: str | None = field(default=None, metadata={"help": "use 'wandb' to log with wandb"})
    learning_rate: float | None = field(default=1.41e-5, metadata={"help": "the learning rate"})
    output_max_length: int | None = field(default=12, metadata={"help": "maximum length for generation"})
    mini_batch_size: int | None = field(default=1, metadata={"help": "the PPO minibatch size"})
    batch_size: int | None = field(default=8, metadata={"help": "the batch size"})
    ppo_epochs: int | None = field(default=2, metadata={"help": "the number of ppo epochs"})
    gradient_accumulation_steps: int | None = field(default=4, metadata={"help": "accumulated mini-batches"})
    adafactor: bool | None = field(default=False, metadata={"help": "whether to use the adafactor optimizer"})
    early_stopping: bool | None = field(default=False, metadata={"help": "whether to early stop"})
    target_kl: float | None = field(default=0.1, metadata={"help": "kl target for early stopping"})
    reward_baseline: float | None = field(default=0.0, metadata={"help": "subtracted from the reward"})
    save_freq: int | None = field(default=None, metadata={"help": "n steps to save the model"})
    output_dir: str | None = field(default="runs/", metadata={"help": "where to save the model"})
    seed: int | None = field(default=0, metadata={"help": "the seed"})
    steps: int | None = field(default=20000, metadata={"help": "number of samples"})
    init_kl_coef: float | None = field(default=0.2, metadata={"help": "Initial KL penalty coefficient"})
    adap_kl_ctrl: bool | None = field(default=True, metadata={"help": "Use adaptive KL control"})


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
config = PPOConfig(
    steps=script_args.steps,
    model_name=script_args.model_name,
    learning_rate=script_args.learning_rate,
    log_with=script_args.log_with,
    batch_size=script_args.batch_size,
    mini_batch_size=script_args.mini_batch_size,
    gradient_accumulation_steps=script_args.gradient_accumulation_steps,
    optimize_cuda_cache=True,
    early_stopping=script_args.early_stopping,
    target_kl=script_args.target_kl,
    ppo_epochs=script_args.ppo_epochs,
    seed=script_args.seed,
    init_kl_coef=script_args.init_kl_coef,
    adap_kl_ctrl=script_args.adap_kl_ctrl,
)
sent_kwargs = {"return_all_scores": True, "function_to_apply": "none", "batch_size": 16, "truncation": True}
tokenizer = AutoTokenizer.from_pretrained(script_args.tokenizer_name)
if getattr(tokenizer, "pad_token", None) is None:
    tokenizer.pad_token = tokenizer.eos_token


def preprocess_function(examples):
    queries = ["Question: " + question[:20] + "\n\nAnswer: " for question in examples["text"]]
    return {"query": queries, "input_ids": [tokenizer(query, truncation=True)["input_ids"] for query in queries]}


dataset = Dataset.from_pandas(pd.read_csv(script_args.questions)[:40])
dataset = dataset.map(preprocess_function, batched=True, remove_columns=dataset.column_names)
dataset = dataset.filter(lambda x: len(x["input_ids"]) < 50, batched=False)
dataset.set_format(type="torch")


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


set_seed(config.seed)
current_device = Accelerator().local_process_index
lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    config.model_name,
    load_in_8bit=True,
    device_map={"": current_device},
    peft_config=lora_config,
)
optimizer = None
if script_args.adafactor:
    optimizer = Adafactor(
        filter(lambda p: p.requires_grad, model.parameters()),
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        lr=config.learning_rate,
    )
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model=None,
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=collator,
    optimizer=optimizer,
)
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline(
    "sentiment-analysis",
    model=script_args.reward_model_name,
    device_map={"": current_device},
    model_kwargs={"load_in_8bit": True},
    tokenizer=AutoTokenizer.from_pretrained(script_args.reward_model_name),
    return_token_type_ids=False,
)
if sentiment_pipe.model.config.pad_token_id is None:
    sentiment_pipe.model.config.pad_token_id = sentiment_pipe.model.config.eos_token_id

generation_kwargs = {
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": 100_000,
}
output_length_sampler = LengthSampler(4, script_args.output_max_length)

for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    if epoch >= config.total_ppo_epochs:
        break
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(
        question_tensors,
        return_prompt=False,
        length_sampler=output_length_sampler,
        **generation_kwargs,
    )
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)

    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
    rewards = [torch.tensor(output[0]["score"] - script_args.reward_baseline) for output in pipe_outputs]

    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    if script_args.save_freq and epoch and epoch % script_args.save_freq == 0:
        ppo_trainer.save_pretrained(script_args.output_dir + f"step_{epoch}")
