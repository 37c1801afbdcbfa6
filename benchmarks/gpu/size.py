"""Part 5. Size: policies of 1B and 8B parameters with random weights in bf16 and adapters, made on the card itself.

Peak memory by phase and samples a second, for short answers as in the published recipe and for longer ones. No texts
and no rewards from a model: responses stay tokens, scores are drawn.
"""

import functools
import math
from typing import Any

from benchmarks.gpu.common import Ends, Results, Setting, attempt, random_queries, rounded, said, synchronized

SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "num_attention_heads": 32},
}
VOCABULARY = 128_256
LOADS = ((128, (2, 8), (4, 16)), (64, (32, 64), (128, 128)))
"""Batch, tokens of a query, tokens of a response."""
STEPS = (3, 2)


def measure(setting: Setting, results: Results) -> None:
    for number, load in enumerate(LOADS):
        for name in SHAPES:
            row = {"model": name, "batch": load[0], "query": _span(load[1]), "response": _span(load[2])}
            work = functools.partial(steps, setting, name, number)
            attempt(setting, results, "size", row, work, limit_s=30.0)


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def llama(setting: Setting, name: str) -> Any:
    """Random weights in bf16, on the device from the start."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "num_key_value_heads": 8, **SHAPES[name]}
    if setting.tiny:
        shape |= {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, tie_word_embeddings=name == "1B"
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def steps(setting: Setting, name: str, load: int) -> dict[str, Any]:
    """A few steps; medians, and the peaks of the last."""
    import torch

    from plaudit.learner.memory import measuring_peak
    from plaudit.learner.rollout import sampler
    from plaudit.learner.stepper import PPOStepper
    from plaudit.policy.adapters import add_lora
    from plaudit.policy.generation import Draws, generate
    from plaudit.policy.model import Policy
    from plaudit.settings.policy import GenerationSettings, LoraSettings
    from plaudit.settings.ppo import PPOHyperparameters

    count, query, response = LOADS[load]
    if setting.tiny:
        count = 4
    device = torch.device(setting.device)
    began = synchronized(setting.device)
    model = llama(setting, name)
    lora = LoraSettings(r=16, alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    policy = Policy(add_lora(model, lora), autocast=torch.bfloat16)
    row: dict[str, Any] = {"parameters": f"{sum(p.numel() for p in policy.model.parameters()) / 1e9:.2f}e9"}
    row["made_s"] = rounded(synchronized(setting.device) - began, 3)
    if setting.on_gpu:
        row["weights_gib"] = rounded(torch.cuda.memory_allocated(device) / 2**30, 3)
    stepper = PPOStepper(policy, None, PPOHyperparameters(batch_size=count, mini_batch_size=count))
    settings = GenerationSettings(min_new_tokens=response[0], max_new_tokens=response[1], batch_size=count)
    try:
        with policy.generating():
            sample = sampler(policy, settings, Ends())
    except Exception as error:
        row["sampler"] = said(error)
        sample = functools.partial(generate, policy.language_model, settings=settings, tokenizer=Ends())
    row["generation"] = type(sample).__name__ if not isinstance(sample, functools.partial) else "dynamic"
    seconds: list[dict[str, float]] = []
    tokens = 0
    for step in range(1 if setting.tiny else STEPS[load]):
        queries = random_queries(count, model.config.vocab_size, at_least=query[0], at_most=query[1], seed=step)
        draws = Draws.of(settings, count, seed=0, step=step)
        times = [synchronized(setting.device)]
        with measuring_peak(device) as generating:
            with policy.generating():
                samples = sample(queries, draws)
            times.append(synchronized(setting.device))
        with measuring_peak(device) as evaluating:
            evaluation = stepper.evaluate(samples)
            times.append(synchronized(setting.device))
        with measuring_peak(device) as updating:
            stepper.update(evaluation.with_scores(torch.randn(count, device=device)))
            times.append(synchronized(setting.device))
        names = ("generate", "evaluate", "update")
        seconds.append({n: b - a for n, a, b in zip(names, times, times[1:], strict=False)})
        peaks = {"generate": generating.mib, "evaluate": evaluating.mib, "update": updating.mib}
        tokens = int(samples.query_mask.sum()) + int(samples.mask.sum())
    last = seconds[-1]
    whole = math.fsum(last.values())
    return {
        **row,
        **{f"{phase}_gib": rounded(peak / 1024, 3) for phase, peak in peaks.items()},
        **{f"{phase}_s": rounded(value, 3) for phase, value in last.items()},
        "samples_per_s": rounded(count / whole, 3),
        "tokens_per_s": rounded(tokens / whole, 3),
        "samples at once": stepper.batch_size_finder.size,
    }
