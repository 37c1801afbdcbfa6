"""Muon on the matrices between hidden states, AdamW on the rest, one schedule over both."""

import copy

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from plaudit.settings.supervised import OptimizerSettings
from plaudit.stages.optimizers import build_optimizer


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_the_block_matrices_and_adamw_everything_else_once() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=2e-5, muon_learning_rate=0.02))
    muon, adamw = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon["params"]} == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert len(muon["params"]) + len(adamw["params"]) == len(names)


def test_a_schedule_moves_the_learning_rates_of_both() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=0.1, muon_learning_rate=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    step(model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_restored_optimizer_takes_the_same_step_under_the_same_schedule() -> None:
    models = [tiny_model(), tiny_model()]
    settings = OptimizerSettings(learning_rate=2e-5, muon_learning_rate=0.02)
    optimizers = [build_optimizer(model, settings) for model in models]
    step(models[0], optimizers[0])
    models[1].load_state_dict(models[0].state_dict())
    # A copy, as a file would be one: torch keeps the tensors that it is given.
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        step(model, optimizer)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
