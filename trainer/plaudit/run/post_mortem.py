"""Diagnostic files of a failed run."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.rollout import CollectedRollout
from plaudit.parallel.processes import Processes
from plaudit.run.storage import NotWritten, write_text


@contextmanager
def keeping_non_finite_batch(collected: CollectedRollout, directory: Path, processes: Processes) -> Iterator[None]:
    """Around an update on `collected`: if it fails with `NonFiniteUpdate`, rank 0 writes the mini-batch's samples.

    A note on the error names the file.
    """
    try:
        yield
    except NonFiniteUpdate as error:
        if processes.is_main:
            try:
                path = save_non_finite_batch(error, collected, directory)
                error.add_note(f"its samples are in {path}; the checkpoints are from before this step")
            except NotWritten as unsaved:
                error.add_note(str(unsaved))
        raise


def save_non_finite_batch(error: NonFiniteUpdate, collected: CollectedRollout, directory: Path) -> Path:
    """Write the samples of the mini-batch with the non-finite loss or gradient. Raises `NotWritten`."""

    def numbers(row: torch.Tensor) -> list[float | str]:
        return [value if math.isfinite(value) else str(value) for value in row.tolist()]

    rollout = collected.rollout
    records = []
    for row in error.rows.tolist():
        real = rollout.samples.mask[row]
        records.append(
            {
                "row": row,
                "prompt": collected.prompts[row],
                "response": collected.responses[row],
                "score": rollout.scores[row].item(),
                "query_tokens": rollout.samples.query_ids[row, rollout.samples.query_mask[row]].tolist(),
                "response_tokens": rollout.samples.response_ids[row, real].tolist(),
                "logprobs": numbers(rollout.logprobs[row, real]),
                "ref_logprobs": numbers(rollout.ref_logprobs[row, real]),
                "values": numbers(rollout.values[row, real]),
            }
        )
    path = directory / f"non-finite-step-{error.step}.json"
    report = {"message": str(error), "step": error.step, "epoch": error.epoch, "samples": records}
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path
