"""The same recipe over trl 1.12.0's `trl.experimental.ppo`, timed: a contestant of `benchmarks.ppo.step`.

Runs in an environment of its own, since no later version has that trainer:

    python3.11 -m venv trl112
    trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \\
        datasets==5.2.0 rich

Its reward model scores the policy's token ids, so both share a tokenizer. As in its own example, the value model is a
second copy of the reward model, of which every parameter learns, and all responses may have the same number of tokens,
`--response-length`. All prompts of a step are generated and evaluated at once. Imports nothing of Plaudit. Prints a
JSON line for each step: seconds a phase, the step's processor time, samples, response tokens, and peak memory.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.ppo.peaks import peak_resident_mib


class Phases(TrainerCallback):
    """Times the phases of a step from within: the trainer has one callback a step, but functions that can be wrapped.

    Generation and scoring are one function each. The update begins with the first forward pass that keeps a graph.
    What is left is evaluation: values, the reference, advantages.
    """

    def __init__(self, batch_size: int, judge: Any) -> None:
        self._batch_size, self._judge = batch_size, judge
        self._generate, self._reward, self._forward = (
            ppo_trainer.batch_generation,
            ppo_trainer.get_reward,
            ppo_trainer.forward,
        )
        ppo_trainer.batch_generation, ppo_trainer.get_reward = self._timed_generate, self._timed_reward
        ppo_trainer.forward = self._noticed_forward
        self._begin()

    def _begin(self) -> None:
        self._seconds = {"generate": 0.0, "reward": 0.0}
        self._tokens = 0
        self._update_began: float | None = None
        self._processor_began, self._began = time.process_time(), time.perf_counter()

    def _timed_generate(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = self._generate(*args, **options)
        self._seconds["generate"] += time.perf_counter() - began
        return result

    def _timed_reward(self, model: Any, query_responses: Any, pad_token_id: int, context_length: int) -> Any:
        began = time.perf_counter()
        result = self._reward(model, query_responses, pad_token_id, context_length)
        if model is self._judge:
            self._seconds["reward"] += time.perf_counter() - began
            self._tokens += int((query_responses[:, context_length:] != pad_token_id).sum())
        return result

    def _noticed_forward(self, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and self._update_began is None:
            self._update_began = time.perf_counter()
        return self._forward(*args, **options)

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self._begin()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        ended = time.perf_counter()
        assert self._update_began is not None
        update, step = ended - self._update_began, ended - self._began
        record = {
            **self._seconds,
            "evaluate": step - update - sum(self._seconds.values()),
            "update": update,
            "step": step,
            "processor": time.process_time() - self._processor_began,
            "samples": self._batch_size,
            "tokens": self._tokens,
            "peak_mib": peak_resident_mib(),
        }
        print(json.dumps(record), flush=True)
        self._begin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a causal LM")
    parser.add_argument("--reward-model", required=True, help="directory of a sequence classifier for the same tokens")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of token lists")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=10)
    parser.add_argument("--lora-r", type=int, default=0, help="0 trains every parameter")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.policy, padding_side="left")
    # As in trl's example: no end of text is taken for padding, and no embedding is needed, for the trainer masks it.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    judge, value_model = (
        AutoModelForSequenceClassification.from_pretrained(arguments.reward_model, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    policy, *reference = (
        AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32)
        for _ in range(1 if arguments.lora_r else 2)
    )
    lora = LoraConfig(r=arguments.lora_r, lora_alpha=2 * arguments.lora_r, task_type="CAUSAL_LM", fan_in_fan_out=True)
    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(
            output_dir=directory,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=arguments.batch_size,
            total_episodes=arguments.steps * arguments.batch_size,
            response_length=arguments.response_length,
            stop_token="eos",
            temperature=1.0,
            learning_rate=1.41e-5,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=arguments.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference[0] if reference else None,
            reward_model=judge,
            value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": json.loads(arguments.prompts.read_text())}),
            callbacks=[Phases(arguments.batch_size, judge)],
            peft_config=lora if arguments.lora_r else None,
        )
        trainer.train()


if __name__ == "__main__":
    main()
