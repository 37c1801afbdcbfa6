"""What a run's files say about how often and how much a trainer asks."""

import json
from pathlib import Path

import pytest

from plaudit.errors import ConfigError
from plaudit.sizing.workload import Draws, Workload, from_metrics, from_run

WORKLOAD = Workload(generate_s=1.0, evaluate_s=0.5, update_s=3.0, texts_per_step=100, chunk_texts=64)


def record(step: int, rollout: float, wait: float, update: float) -> dict[str, float]:
    return {"step": step, "time/rollout_s": rollout, "time/reward_wait_s": wait, "time/update_s": update}


def test_a_step_is_cut_into_chunks_and_requests() -> None:
    assert WORKLOAD.chunks == [[32, 32], [32, 4]]
    assert WORKLOAD.requests_per_step == 4


def test_a_step_without_waits_is_its_chunks_and_its_update() -> None:
    assert WORKLOAD.step_s == 2 * 1.5 + 3.0
    assert WORKLOAD.stretched(10).step_s == 60.0


def test_the_first_step_and_the_waits_are_left_out_of_a_runs_times() -> None:
    records = [record(0, 90, 80, 99), record(1, 4, 1, 6), record(2, 4, 0, 6), record(3, 10, 7, 6)]
    workload = from_metrics(records, texts_per_step=128, chunk_texts=128, tokens_per_text=20, evaluate_share=0.25)
    assert workload.generate_s == pytest.approx(0.75 * 3)  # the median of 3, 4 and 3
    assert workload.evaluate_s == pytest.approx(0.25 * 3)
    assert workload.update_s == 6


def test_a_run_that_has_hardly_begun_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 steps in the metrics"):
        from_metrics([record(0, 1, 0, 1)], texts_per_step=128, chunk_texts=128, tokens_per_text=20)


def a_run(directory: Path) -> Path:
    directory.mkdir(parents=True)
    lengths = {"tokens/queries_len_mean": 5.0, "tokens/responses_len_mean": 10.0}
    lines = [json.dumps(record(step, 4, 1, 6) | lengths) for step in range(5)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "ppo": {"batch_size": 256},
        "generation": {"batch_size": 64},
        "reward": {"chunk_size": 16, "max_in_flight": 4},
    }
    (directory / "run.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("below", ["", "ppo"])
def test_a_runs_directory_is_read(tmp_path: Path, below: str) -> None:
    a_run(tmp_path / "run" / below)
    workload = from_run(tmp_path / "run")
    assert workload.tokens_per_text == 17  # 5 + 10, and two around them
    assert (workload.texts_per_step, workload.chunk_texts, workload.request_texts) == (256, 64, 16)
    assert workload.in_flight == 4
    assert workload.step_s == pytest.approx(3 + 6)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        from_run(tmp_path)
    (a_run(tmp_path / "run") / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run\.json can't be read"):
        from_run(tmp_path / "run")


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="texts_per_step=0"):
        Workload(generate_s=1, evaluate_s=0, update_s=1, texts_per_step=0, chunk_texts=1)
    with pytest.raises(ConfigError, match="update_s=-1"):
        Workload(generate_s=1, evaluate_s=0, update_s=-1, texts_per_step=1, chunk_texts=1)


def test_each_trainer_draws_its_own_numbers_and_the_same_ones_again() -> None:
    one, again, other = Draws(WORKLOAD, 1), Draws(WORKLOAD, 1), Draws(WORKLOAD, 2)
    assert (one.tokens, one.jittered(1.0)) == (again.tokens, again.jittered(1.0))
    assert one.tokens != other.tokens
    assert sum(one.tokens) / len(one.tokens) == pytest.approx(WORKLOAD.tokens_per_text, rel=0.1)
