"""The classic trainer itself, run again from its own recordings: how close to a recording can anybody come?

    python3.11 -m venv classic
    classic/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 peft==0.13.2 accelerate==0.34.2 \
        datasets==2.21.0 numpy==1.26.4 'pyarrow<18' rich
    classic/bin/python benchmarks/ppo/classic_rerun.py

For each case in tests/fixtures/classic_ppo, the largest distance between the weights after three steps and the recorded
ones: of attention's key bias, whose gradient is zero in mathematics, and of everything else. ATEN_CPU_CAPABILITY=avx2
(or default) takes another instruction set, `--attention eager` other kernels. Imports nothing of this project.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import masked_whiten

RECORDINGS = Path(__file__).parents[2] / "tests" / "fixtures" / "classic_ppo"
Weights = dict[str, torch.Tensor]


class Mended(PPOTrainer):
    """With the three defects mended that were mended before recording."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_params = [p for p in self.model.parameters() if p.requires_grad]
        moments = getattr(self, "running", None)
        if moments is not None:
            update = moments.update

            def update_to_tensors(scores: torch.Tensor) -> Any:
                result = update(scores)
                moments.mean, moments.std = torch.as_tensor(moments.mean), torch.as_tensor(moments.std)
                return result

            moments.update = update_to_tensors

    def compute_advantages(self, values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> Any:
        whitens = self.config.whiten_rewards
        if whitens:
            rewards = masked_whiten(rewards * mask, mask, shift_mean=False) * mask
        self.config.whiten_rewards = False
        result = super().compute_advantages(values, rewards, mask)
        self.config.whiten_rewards = whitens
        return result


def with_value_head(model: Any, *, adapters: bool) -> Any:
    wrapped = AutoModelForCausalLMWithValueHead(model)
    wrapped.is_peft_model = adapters
    for module in wrapped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return wrapped


def part(tensors: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def language_model(vocab_size: int, weights: Weights, attention: str) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size, 64, 32, 2, 2, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return model


def make_trainer(case: dict[str, Any], tensors: Weights, attention: str) -> Mended:
    start, adapters = part(tensors, "policy/"), case["lora"] is not None
    head = {name: t for name, t in start.items() if name.startswith("v_head.")}
    body = {name.removeprefix("pretrained_model."): t for name, t in start.items() if name not in head}
    initial = language_model(case["vocab_size"], part(tensors, "initial/"), attention)
    if adapters:
        settings = peft.LoraConfig(**case["lora"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        base = peft.get_peft_model(initial, settings)
        assert not base.load_state_dict(body, strict=False).unexpected_keys
    else:
        base = language_model(case["vocab_size"], body, attention)
    policy = with_value_head(base, adapters=adapters)
    policy.v_head.load_state_dict(part(head, "v_head."))
    words = {f"t{i}": i for i in range(case["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0", eos_token="t0"
    )
    tokenizer.padding_side = "right"
    config = PPOConfig(**{name: value for name, value in case["config"].items() if name != "optimizer"})
    reference = None if adapters else with_value_head(initial, adapters=False)
    return Mended(config=config, model=policy, ref_model=reference, tokenizer=tokenizer)


def differences(name: str, attention: str) -> tuple[float, float]:
    """Largest distance from the recorded weights after three steps: of the key bias, and of all others."""
    with safe_open(RECORDINGS / f"{name}.safetensors", "pt") as file:
        case, tensors = json.loads(file.metadata()["case"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    trainer = make_trainer(case, tensors, attention)
    samples = range(case["config"]["batch_size"])
    for step, recorded in enumerate(case["steps"]):
        permutations = iter(recorded["minibatch_permutations"])
        np.random.permutation = lambda _, permutations=permutations: np.array(next(permutations))
        queries = [tensors[f"step{step}/query/{i}"] for i in samples]
        responses = [tensors[f"step{step}/response/{i}"] for i in samples]
        trainer.step(queries, responses, list(tensors[f"step{step}/scores"]))
    own = dict(trainer.model.named_parameters())
    key_bias = others = 0.0
    for key, weight in part(tensors, "after_step2/").items():
        distance = (own[key].detach() - weight).abs()
        if key.endswith("c_attn.bias"):
            query, bias, value = distance.chunk(3)
            key_bias, distance = max(key_bias, bias.max().item()), torch.cat([query, value])
        others = max(others, distance.max().item())
    return key_bias, others


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'case':<36} {'key bias':>9} {'others':>9}")
    for path in sorted(RECORDINGS.glob("*.safetensors")):
        key_bias, others = differences(path.stem, arguments.attention)
        print(f"{path.stem:<36} {key_bias:>9.1e} {others:>9.1e}", flush=True)


if __name__ == "__main__":
    main()
