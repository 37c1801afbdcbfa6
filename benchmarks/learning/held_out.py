"""Policies on the same held-out prompts, from the same random numbers: what `plaudit evaluate` measures, by prompt.

Failure mode: two policies that answer other prompts, or from other random numbers.
"""

import torch

from benchmarks.learning.analysis import Judged
from plaudit.report.evaluation import sequence_kl
from plaudit.rewards import RewardClient
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.stages.evaluate import answer, held_out_prompts, load_pair


@torch.no_grad()
def judge_adapters(config: EvaluateConfig, client: RewardClient, *, before: bool = False) -> Judged:
    """The policy `config.after`, adapters on `config.policy`; or the latter itself, if `before`."""
    policy, tokenizer = load_pair(config)
    answers = answer(
        policy,
        tokenizer,
        prompts=held_out_prompts(config, policy, tokenizer),
        client=client,
        judges=None,
        config=config,
        as_reference=before,
        cached=True,
    )
    return Judged(sequence_kl(answers.logprobs, answers.reference_logprobs), list(answers.rewards))
