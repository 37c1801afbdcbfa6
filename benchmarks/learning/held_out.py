"""Policies on the same held-out prompts, from the same random numbers: what `plaudit evaluate` measures, by prompt.

Failure mode: two policies that answer other prompts, or from other random numbers.
"""

import torch

from benchmarks.learning.analysis import Judged
from plaudit.policy.endings import Endings
from plaudit.policy.generation import Draws, generate
from plaudit.report.evaluation import sequence_kl
from plaudit.rewards import RewardClient
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.stages.evaluate import held_out_prompts, load_pair


@torch.no_grad()
def judge_adapters(config: EvaluateConfig, client: RewardClient, *, before: bool = False) -> Judged:
    """The policy `config.after`, adapters on `config.policy`; or the latter itself, if `before`."""
    policy, tokenizer = load_pair(config)
    prompts = held_out_prompts(config, policy, tokenizer)
    settings = config.generation.answering(config.prompts.kind)
    draws = Draws.of(settings, len(prompts), seed=config.seed, step=0)
    endings = Endings.of(policy.language_model, tokenizer, settings)
    pending, own, reference = [], [], []
    for start in range(0, len(prompts), settings.batch_size):
        stop = min(start + settings.batch_size, len(prompts))
        chunk, own_draws = prompts.rows(start, stop), draws.rows(start, stop)
        if before:
            with policy.as_reference() as model:
                samples = generate(model, chunk.token_ids, own_draws, settings, tokenizer)
        else:
            samples = generate(policy.language_model, chunk.token_ids, own_draws, settings, tokenizer)
        pending.append(client.submit_components(chunk.judged, endings.texts(samples), chunk.fields))
        if not before:
            own += policy(samples).logprobs.sum(1).tolist()
            reference += policy.reference_logprobs(samples).sum(1).tolist()
    rewards = [float(reward) for future in pending for reward in future.result().totals]
    return Judged(0.0 if before else sequence_kl(own, reference), rewards)
