"""Part 6. Two processes on one card: the same numbers as one process, and what sharing costs.

They talk by gloo, since NCCL gives each process a card of its own.
"""

import functools
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import FORKS, Results, Setting, attempt, policy_of, rounded, said, small_model
from benchmarks.gpu.right import random_samples

STEPS = 3


def measure(setting: Setting, results: Results) -> None:
    attempt(setting, results, "two processes", {}, functools.partial(compare, setting))


def compare(setting: Setting) -> list[dict[str, Any]]:
    alone, together = (_in_processes(setting, count) for count in (1, 2))
    errors = [each["error"] for each in (*alone, *together) if "error" in each]
    if errors:
        raise RuntimeError(errors[0])
    weights = [
        max(abs(a - b) for a, b in zip(one["weights"], other["weights"], strict=True))
        for one, other in ((alone[0], together[0]), (together[0], together[1]))
    ]
    ratios = [max(abs(a - b) for a, b in zip(alone[0]["losses"], together[0]["losses"], strict=True))]
    return [
        {
            "processes": 1,
            "step_ms": rounded(1e3 * alone[0]["step_s"]),
        },
        {
            "processes": 2,
            "step_ms": rounded(1e3 * max(each["step_s"] for each in together)),
            "weights differ from one process's by": rounded(weights[0], 3),
            "and from each other's by": rounded(weights[1], 3),
            "losses by": rounded(ratios[0], 3),
        },
    ]


def _in_processes(setting: Setting, count: int) -> list[dict[str, Any]]:
    meeting = setting.work / f"meeting-{count}"
    meeting.unlink(missing_ok=True)
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_rank, args=(setting, rank, count, meeting, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            answers.append(pipe.recv() if pipe.poll(max(1.0, setting.left_s)) else {"error": "not done in time"})
        except EOFError:
            process.join(5)
            answers.append({"error": f"the process ended with {process.exitcode}"})
    for process in processes:
        process.kill()
        process.join(5)
    return answers


def _rank(setting: Setting, rank: int, count: int, meeting: Path, answer: Any) -> None:
    try:
        answer.send(_steps(setting, rank, count, meeting))
    except BaseException as error:
        answer.send({"error": said(error)})
    os._exit(0)


def _steps(setting: Setting, rank: int, count: int, meeting: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from plaudit.learner.stepper import PPOStepper
    from plaudit.parallel.processes import Processes
    from plaudit.settings.ppo import PPOHyperparameters

    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    batch = 8 if setting.tiny else 128
    model = small_model("gpt2", setting.device, tiny=setting.tiny)
    policy = policy_of(model, "fp32")
    config = PPOHyperparameters(batch_size=batch, mini_batch_size=batch, learning_rate=1e-3)
    stepper = PPOStepper(policy, None, config, processes=Processes(rank, count))
    scores = torch.randn(batch, generator=torch.Generator().manual_seed(0)).to(setting.device)
    losses, seconds = [], []
    for step in range(STEPS):
        samples = random_samples(setting, model.config.vocab_size, batch, seed=step)
        began = time.perf_counter()
        result = stepper.update(stepper.evaluate(samples).with_scores(scores))
        seconds.append(time.perf_counter() - began)
        losses.append(result.statistics["ppo/loss/total"])
    weights = torch.cat([p.detach().flatten().cpu() for p in policy.parameters() if p.requires_grad])
    return {"weights": weights.tolist(), "losses": losses, "step_s": min(seconds)}
