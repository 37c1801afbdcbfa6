"""What a run that went wrong leaves behind for a person to look into."""

import json
import math
from pathlib import Path

import torch

from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.rollout import Collected
from plaudit.run.storage import write_text


def save_non_finite_batch(error: NonFiniteUpdate, collected: Collected, directory: Path) -> Path:
    """Writes the samples of the mini-batch that gave no finite loss or gradient. Raises `NotWritten`."""

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
