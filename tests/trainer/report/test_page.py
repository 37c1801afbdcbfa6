"""The report stands alone, shows what it is given, and takes model output for text whatever it contains."""

import csv
import io
import re

import pytest
from rich.console import Console

from plaudit.report.evaluation import Answers, compare
from plaudit.report.page import (
    Sample,
    pair_samples,
    render_report,
    samples_table,
    smooth,
    summary_table,
    verdict,
    write_samples,
)
from plaudit.run.metrics import KL, REWARD_MEAN
from plaudit.settings.plain import to_dict
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

NASTY = ' <script>alert(1)</script> & "quoted", [bold]marked[/bold]\nnew line'
TRAINING = [{"step": step, REWARD_MEAN: 0.1 * step, KL: 0.2 * step} for step in range(5)]


def answers(rewards: list[float], word: str) -> Answers:
    n = len(rewards)
    return Answers(
        texts=tuple(f" {word} {i}" for i in range(n)),
        rewards=tuple(rewards),
        logprobs=(-10.0,) * n,
        reference_logprobs=(-12.5,) * n,
        plain_reference_logprobs=(-12.5,) * n,
        token_counts=(5,) * n,
    )


@pytest.fixture(scope="module")
def before() -> Answers:
    return answers([-1.0, 0.0, 1.0, 2.0], "awful")


@pytest.fixture(scope="module")
def after() -> Answers:
    return answers([1.25, 2.5, 3.25, 3.0], "lovely")


@pytest.fixture(scope="module")
def samples(before, after) -> list[Sample]:
    return pair_samples(["One", "Two", "Three", "Four"], before, after)


@pytest.fixture(scope="module")
def document(before, after, samples) -> str:
    return render_report(
        title="A run",
        evaluation=compare(before, after),
        samples=samples,
        training=TRAINING,
        settings={"ppo": to_dict(PPOConfig(ppo=PPOHyperparameters()))},
    )


def test_nothing_is_loaded_from_elsewhere(document):
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)', document) + re.findall(r"url\(([^)]*)", document)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "@import" not in document
    assert "<script" not in document
    assert "<link" not in document


def test_the_figures_at_the_head_are_those_of_the_evaluation(document, before, after):
    low, high = compare(before, after).reward.difference.ci95
    assert "+2.00" in document
    assert f"+{low:.2f} to +{high:.2f}" in document
    assert "0.50 → 2.50" in document
    assert "2.50</div>" in document  # KL
    assert "× 1.00" in document


def test_every_setting_of_the_run_is_there(document):
    for text in ("Settings: ppo", "cliprange_value", "min_text_chars", "1.41e-05", "lvwerra/gpt2-imdb"):
        assert text in document


def test_without_training_metrics_there_are_no_curves(document, before, after, samples):
    assert "5 PPO steps" in document
    bare = render_report(title="A run", evaluation=compare(before, after), samples=samples, training=[{"step": 0}])
    assert "PPO steps" not in bare


def test_model_output_is_text_in_the_report_and_on_the_console(before, after, samples):
    nasty = [Sample(NASTY, NASTY, NASTY, 0.0, 1.0), *samples[1:]]
    assert "&lt;script&gt;alert(1)" in render_report(title="", evaluation=compare(before, after), samples=nasty)
    file = io.StringIO()
    Console(file=file, width=400).print(samples_table(nasty))
    assert "[bold]marked[/bold]" in file.getvalue()


def test_samples_csv_gives_back_what_was_written(tmp_path, samples):
    rows = [Sample(NASTY, "", " été\r\n", -0.1, 1 / 3), *samples]
    write_samples(tmp_path / "samples.csv", rows)
    with (tmp_path / "samples.csv").open(encoding="utf-8", newline="") as file:
        read = [
            Sample(
                row["query"],
                row["response_before"],
                row["response_after"],
                float(row["reward_before"]),
                float(row["reward_after"]),
            )
            for row in csv.DictReader(file)
        ]
    assert read == rows


def test_the_verdict_says_no_more_than_the_interval_allows(before, after):
    assert "rose" in verdict(compare(before, after))
    assert "fell" in verdict(compare(after, before))
    assert "No change is shown" in verdict(compare(answers([0.0, 1.0], "a"), answers([1.0, 0.0], "b")))


def test_smoothing_by_hand():
    # 1; (0.5 * 1 + 3) / 1.5; (0.5 * 3.5 + 0) / 1.75
    assert smooth([1.0, 3.0, 0.0], 0.5) == pytest.approx([1.0, 3.5 / 1.5, 1.0])


def test_smoothing_leaves_a_constant_alone_and_no_weight_changes_nothing():
    assert smooth([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smooth([1.0, -3.0, 2.0], 0.0) == [1.0, -3.0, 2.0]


def test_the_console_summary_has_every_figure(before, after):
    file = io.StringIO()
    Console(file=file, width=120).print(summary_table(compare(before, after)))
    for text in ("0.50", "2.50", "+2.00", "95 % interval", "2.75", "× 1.00", "distinct responses"):
        assert text in file.getvalue()


def test_a_single_step_and_equal_rewards_still_draw():
    same = answers([1.0, 1.0], "same")
    rows = pair_samples(["a", "b"], same, same)
    document = render_report(title="", evaluation=compare(same, same), samples=rows, training=TRAINING[:1])
    assert document.count("data:image/svg+xml") == 2
    assert "+0.00" in document


def test_no_text_in_samples_csv_is_a_formula(tmp_path):
    rows = [
        Sample(text, text, "- a list", 0.1, -0.2) for text in ('=HYPERLINK("http://evil","x")', "@SUM(1)", "+1", "a=b")
    ]
    write_samples(tmp_path / "samples.csv", rows)
    with (tmp_path / "samples.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["query"] for row in read] == ['\'=HYPERLINK("http://evil","x")', "'@SUM(1)", "'+1", "a=b"]
    assert {row["response_after"] for row in read} == {"'- a list"}
    assert {float(row["reward_after"]) for row in read} == {-0.2}
