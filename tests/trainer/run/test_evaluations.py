"""The record of held-out evaluations: which was best, and when a run ends early."""

from pathlib import Path

import pytest

from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.run.evaluations import best_of, forget_evaluations_after, read_answers, reason_to_stop, write_answers
from plaudit.settings.watch import WatchSettings


def records(*rewards: float, kl: float = 1.0) -> list[dict[str, float]]:
    """One evaluation every ten steps."""
    return [
        {"step": 10 * i, "eval/reward": reward, "eval/win_rate": 0.5, "eval/kl": kl} for i, reward in enumerate(rewards)
    ]


def test_the_best_is_the_highest_and_the_earliest_of_equal_ones() -> None:
    watch = WatchSettings(eval_every=10)
    assert best_of([], watch) is None
    assert best_of(records(0.0, 2.0, 1.0, 2.0), watch) == records(0.0, 2.0)[1]


def test_patience_counts_evaluations_since_the_best() -> None:
    watch = WatchSettings(eval_every=10, stop_patience=2)
    assert reason_to_stop([], watch) is None
    assert reason_to_stop(records(0.0, 2.0, 1.0), watch) is None
    # Equal is no new best.
    assert reason_to_stop(records(0.0, 2.0, 1.0, 2.0), watch) == (
        "after step 30, no new best held-out reward in 2 evaluations (watch.stop_patience=2); the best is 2.000 after "
        "step 10"
    )
    assert reason_to_stop(records(0.0, 2.0, 1.0, 2.5), watch) is None


def test_a_kl_above_the_bound_and_a_target_that_is_reached_end_the_run() -> None:
    watch = WatchSettings(eval_every=10, stop_kl=5.0, stop_target=2.0)
    assert reason_to_stop(records(0.0, 1.9, kl=5.0), watch) is None
    assert reason_to_stop(records(0.0, 1.9, kl=5.5), watch) == (
        "after step 10, the held-out KL is 5.50 nats, more than watch.stop_kl=5"
    )
    assert reason_to_stop(records(0.0, 2.0), watch) == (
        "after step 10, the held-out reward is 2.000, which reaches watch.stop_target=2"
    )


def test_the_best_may_go_by_another_figure() -> None:
    two = records(2.0, 1.0)
    two[1]["eval/win_rate"] = 0.75
    assert best_of(two, WatchSettings(eval_every=10, best_by="win_rate")) == two[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_by": "length"}, "best_by='length': there is no such figure; there are reward, win_rate$"),
        ({"stop_kl": 3.0}, "stop_kl=3.0 needs evaluations: give watch.eval_every"),
        ({"eval_every": 0}, "eval_every=0 must be greater than 0"),
        ({"eval_every": 5, "stop_target": float("nan")}, "stop_target=nan must be finite"),
        ({"eval_every": 5, "eval_prompts": 1}, "eval_prompts=1 must be 2 or more"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WatchSettings(**settings)  # type: ignore[arg-type]


def test_the_only_judge_is_called_judge_and_others_have_their_names() -> None:
    assert WatchSettings(judges=RewardSettings.of(url=("http://x",))).figures[2:] == ("judge/reward", "judge/win_rate")
    both = RewardSettings((RewardComponent(name="a", url=("http://a",)), RewardComponent(name="b", url=("http://b",))))
    assert WatchSettings(judges=both, best_by="b/win_rate").figures[2:] == (
        *("a/reward", "a/win_rate"),
        *("b/reward", "b/win_rate"),
    )


def test_what_a_resumed_run_repeats_is_forgotten(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "eval/reward": 1.0}}\n' for step in (0, 10, 11)]
    (tmp_path / "evaluations.jsonl").write_text("".join(lines) + '{"step": 30, "eval/re')
    for step in (0, 10, 11, 30):
        write_answers(tmp_path, step, [{"step": step, "response": "a\u2028b"}])
    assert read_answers(tmp_path, 11) == [{"step": 11, "response": "a\u2028b"}]
    assert forget_evaluations_after(tmp_path, 10) == []
    assert (tmp_path / "evaluations.jsonl").read_text() == "".join(lines[:2])
    assert sorted(path.name for path in (tmp_path / "held-out").iterdir()) == ["step-000000.jsonl", "step-000010.jsonl"]
    assert read_answers(tmp_path, 11) == []
