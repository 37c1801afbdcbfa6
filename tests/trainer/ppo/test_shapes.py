"""Tensors that torch would broadcast to something nobody meant are refused, with both shapes."""

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plaudit.ppo import distributions, kl, losses, masked, rewards
from plaudit.ppo.advantages import gae

B, T, V = 2, 3, 5


def of(*shape: int) -> Tensor:
    return torch.zeros(shape)


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "gae: values": (
        lambda: gae(of(B, T), of(B, 1), mask(B, T), gamma=1, lam=1),
        "values has shape (2, 1) and rewards (2, 3)",
    ),
    "gae: mask": (
        lambda: gae(of(B, T), of(B, T), mask(B, T + 1), gamma=1, lam=1),
        "mask has shape (2, 4) and rewards (2, 3)",
    ),
    "gae: flat": (
        lambda: gae(of(T), of(T), mask(T), gamma=1, lam=1),
        "rewards has shape (3,): its rank must be 2",
    ),
    "masked_sum": (lambda: masked.masked_sum(of(B, T), mask(T)), "mask has shape (3,) and values (2, 3)"),
    "masked_mean": (lambda: masked.masked_mean(of(T), mask(B, T)), "mask has shape (2, 3) and values (3,)"),
    "masked_var": (lambda: masked.masked_var(of(B, 1), mask(B, T)), "mask has shape (2, 3) and values (2, 1)"),
    "whiten": (lambda: masked.whiten(of(B, T), mask(B, 1)), "mask has shape (2, 1) and values (2, 3)"),
    "scale": (lambda: masked.scale(of(B, T), mask(1, T)), "mask has shape (1, 3) and values (2, 3)"),
    **{
        f"kl: {name}": (
            functools.partial(estimator, of(B, T), of(B, 1)),
            "ref_logprobs has shape (2, 1) and logprobs (2, 3)",
        )
        for name, estimator in kl.ESTIMATORS.items()
    },
    "full_kl": (
        lambda: kl.full_kl(of(B, T, V), of(T, V)),
        "ref_log_distribution has shape (3, 5) and log_distribution (2, 3, 5)",
    ),
    "policy_losses": (
        lambda: losses.policy_losses(of(B, T), of(B, 1), cliprange=0.2),
        "advantages has shape (2, 1) and ratios (2, 3)",
    ),
    "policy_clipped": (
        lambda: losses.policy_clipped(of(B, T), of(T), cliprange=0.2),
        "advantages has shape (3,) and ratios (2, 3)",
    ),
    "clip_values": (
        lambda: losses.clip_values(of(B, T), of(B, 1), cliprange=0.2),
        "old_values has shape (2, 1) and values (2, 3)",
    ),
    "value_losses: old values": (
        lambda: losses.value_losses(of(B, T), of(B, 1), of(B, T), cliprange=0.2),
        "old_values has shape (2, 1) and values (2, 3)",
    ),
    "value_losses: returns": (
        lambda: losses.value_losses(of(B, T), of(B, T), of(B, 1), cliprange=0.2),
        "returns has shape (2, 1) and values (2, 3)",
    ),
    "value_clipped": (
        lambda: losses.value_clipped(of(B, T), of(B, T), of(T), cliprange=0.2),
        "returns has shape (3,) and values (2, 3)",
    ),
    "token_rewards: scores": (
        lambda: rewards.token_rewards(of(B, 1), of(B, T), mask(B, T), kl_coef=0.1),
        "scores has shape (2, 1) and mask (2, 3): scores must have one number for each row, (2,)",
    ),
    "token_rewards: one score for all": (
        lambda: rewards.token_rewards(of(1), of(B, T), mask(B, T), kl_coef=0.1),
        "scores has shape (1,) and mask (2, 3)",
    ),
    "token_rewards: kls": (
        lambda: rewards.token_rewards(of(B), of(B, 1), mask(B, T), kl_coef=0.1),
        "kls has shape (2, 1) and mask (2, 3)",
    ),
    "penalise_missing_eos": (
        lambda: rewards.penalise_missing_eos(of(B), mask(B, 1), 1.0),
        "ended has shape (2, 1) and scores (2,)",
    ),
    "penalise_length": (
        lambda: rewards.penalise_length(of(B), of(T), free_tokens=1, penalty_per_token=1.0),
        "lengths has shape (3,) and scores (2,)",
    ),
    "moments": (
        lambda: rewards.RunningMoments().update(of(B, T)),
        "scores has shape (2, 3): its rank must be 1",
    ),
    "sampling_logits": (
        lambda: distributions.sampling_logits(of(B, V), support=mask(V)),
        "support has shape (5,) and logits (2, 5)",
    ),
    "token_statistics: one token for all": (
        lambda: distributions.token_statistics(of(B, V), of(1).long()),
        "token_ids has shape (1,) and logits (2, 5): token_ids must have one number for each row, (2,)",
    ),
    "token_statistics: a batch": (
        lambda: distributions.token_statistics(of(B, T, V), of(B, T).long()),
        "logits has shape (2, 3, 5): its rank must be 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_shapes_are_refused_with_both(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_compiled_function_checks_too_and_has_no_break() -> None:
    # The check becomes a guard: other shapes are compiled anew, and wrong ones refused.
    compiled = torch.compile(masked.whiten, backend="eager", fullgraph=True)
    values = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.equal(compiled(values, mask(1, 3)), masked.whiten(values, mask(1, 3)))
    with pytest.raises(ValueError, match=re.escape("mask has shape (1, 1) and values (1, 3)")):
        masked.whiten(values, mask(1, 1))


def test_a_check_reads_no_number() -> None:
    # On the meta device there are none to read.
    values, real = torch.zeros(B, T, device="meta"), torch.ones(B, T, dtype=torch.bool, device="meta")
    assert masked.whiten(values, real).shape == (B, T)
    assert losses.value_losses(values, values, values, cliprange=0.2).shape == (B, T)
    assert gae(values, values, real, gamma=1.0, lam=1.0)[0].shape == (B, T)
