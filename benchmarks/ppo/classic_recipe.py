"""The published recipe as it was run with trl 0.11.4, timed: what `benchmarks.ppo.step` compares with.

Runs in an environment of its own, since that version needs older libraries:

    python3.11 -m venv classic
    classic/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 peft==0.13.2 accelerate==0.34.2 \\
        datasets==2.21.0 numpy==1.26.4 'pyarrow<18'

One sample is generated at a time, policy and reference are two copies, the classifier runs in the same process. With
`--batched` the trainer's `generate` gets all queries of a step as one list and one batch; it knows one length for a
batch, so it generates the longest, and each response is cut at its own. With `--library plaudit.classic` the same
program runs over Plaudit's classic API, in Plaudit's environment; otherwise it imports nothing of Plaudit. Prints a
JSON line for each step: seconds a phase, the step's processor time, samples, response tokens, and peak memory.
"""

import argparse
import importlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from benchmarks.ppo.peaks import peak_resident_mib

SHORTEST, LONGEST = 4, 16
"""Response tokens."""


def tokenizer_of(directory: str, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(Path(directory) / "tokenizer.json"), **special)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a causal LM")
    parser.add_argument("--reward-model", required=True, help="directory of a sequence classifier")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of token lists")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lora-r", type=int, default=0, help="0 trains every parameter, as the recipe does")
    parser.add_argument("--batched", action="store_true", help="generate the responses of a step in one batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--library", default="trl", help="where PPOTrainer comes from: trl, or plaudit.classic")
    arguments = parser.parse_args()
    library = importlib.import_module(arguments.library)
    warnings.filterwarnings("ignore")

    torch.manual_seed(0)
    end = "<|endoftext|>"
    tokenizer = tokenizer_of(arguments.policy, eos_token=end, pad_token=end)
    lora = LoraConfig(r=arguments.lora_r, lora_alpha=2 * arguments.lora_r, task_type="CAUSAL_LM", fan_in_fan_out=True)
    options = {"peft_config": lora} if arguments.lora_r else {}
    load = library.AutoModelForCausalLMWithValueHead.from_pretrained
    model = load(arguments.policy, **options)
    reference = None if arguments.lora_r else load(arguments.policy)
    batch_size = arguments.batch_size
    config = library.PPOConfig(batch_size=batch_size, mini_batch_size=batch_size, learning_rate=1.41e-5)
    trainer = library.PPOTrainer(config, model, reference, tokenizer)
    judge = pipeline(
        "text-classification",
        # Later transformers load it in the file's fp16, which is slow on a CPU; the version beside TRL 0.11.4 in fp32.
        model=AutoModelForSequenceClassification.from_pretrained(arguments.reward_model).float(),
        tokenizer=tokenizer_of(
            arguments.reward_model, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
        ),
        device=arguments.device,
    )
    judge.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    lengths = torch.Generator().manual_seed(0)
    prompts = [torch.tensor(prompt, device=arguments.device) for prompt in json.loads(arguments.prompts.read_text())]
    sampling = {"min_length": -1, "top_k": 0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id}
    for step in range(arguments.steps):
        offset = step * arguments.batch_size
        queries = [prompts[(offset + i) % len(prompts)] for i in range(arguments.batch_size)]
        processor_began, began = time.process_time(), time.perf_counter()
        most = [int(torch.randint(SHORTEST, LONGEST + 1, (), generator=lengths)) for _ in queries]
        if arguments.batched:
            whole = trainer.generate(
                queries, batch_size=batch_size, return_prompt=False, max_new_tokens=LONGEST, **sampling
            )
            responses = [response[:length] for response, length in zip(whole, most)]  # noqa: B905
        else:
            responses = [
                trainer.generate(query, max_new_tokens=length, **sampling).squeeze()[-length:]
                for query, length in zip(queries, most)  # noqa: B905
            ]
        generated = time.perf_counter()
        texts = [tokenizer.decode(torch.cat(pair)) for pair in zip(queries, responses)]  # noqa: B905
        outputs = judge(texts, top_k=None, function_to_apply="none", batch_size=16, truncation=True)
        scores = [torch.tensor(max(label["score"] for label in output)) for output in outputs]
        judged = time.perf_counter()
        statistics = trainer.step(queries, responses, scores)
        ended = time.perf_counter()
        update = statistics["time/ppo/optimize_step"]
        record = {
            "generate": generated - began,
            "reward": judged - generated,
            "evaluate": ended - judged - update,
            "update": update,
            "step": ended - began,
            "processor": time.process_time() - processor_began,
            "samples": arguments.batch_size,
            "tokens": sum(map(len, responses)),
            "peak_mib": peak_resident_mib(),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
