"""The classic trainer's step in several real processes, each with its own share of the same samples."""

import os
import socket
from multiprocessing.connection import Connection
from typing import Any

import torch

from harness.runs import FORKS
from harness.small_step import QUERIES, RESPONSES, SCORES
from harness.tiny_models import tiny_gpt2, tiny_tokenizer
from plaudit.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

STEPS = 2


def steps(count: int, rank: int = 0) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Statistics of each step, and the weights at the end, of process `rank` among `count`."""
    torch.set_num_threads(1)
    own = slice(rank * 4 // count, (rank + 1) * 4 // count)
    config = PPOConfig(
        batch_size=4 // count,
        mini_batch_size=2 // count,
        ppo_epochs=2,
        learning_rate=1e-3,
        use_score_scaling=True,
        accelerator_kwargs={"cpu": True},
    )
    # Every process would make another value head of its own: the first one's counts.
    torch.manual_seed(rank)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    queries, responses = ([torch.tensor(row) for row in rows[own]] for rows in (QUERIES, RESPONSES))
    scores = [torch.tensor(score) for score in SCORES[own]]
    history = [trainer.step(queries, responses, scores) for _ in range(STEPS)]
    numbers = [{n: v for n, v in step.items() if isinstance(v, float) and "time/" not in n} for step in history]
    return numbers, {name: parameter.detach() for name, parameter in model.named_parameters()}


def steps_in_processes(count: int) -> list[tuple[list[dict[str, float]], dict[str, torch.Tensor]]]:
    """What `steps` gives in each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    pipes, processes = [], []
    for rank in range(count):
        receiving, sending = FORKS.Pipe(duplex=False)
        environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        process = FORKS.Process(target=_report, args=(environment, count, rank, sending), daemon=True)
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [(numbers, {n: torch.tensor(w) for n, w in weights.items()}) for numbers, weights in results]


def _report(environment: dict[str, str], count: int, rank: int, pipe: Connection) -> None:
    os.environ |= environment
    numbers, weights = steps(count, rank)
    lists: dict[str, Any] = {name: weight.tolist() for name, weight in weights.items()}
    pipe.send((numbers, lists))
    torch.distributed.destroy_process_group()
