"""Pages of runs: what they say, that texts stay texts, and that nothing is loaded from elsewhere."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from plaudit.errors import ConfigError
from plaudit.report import run_data
from plaudit.report.changes import Changed, changes, held_out_changes, paragraph
from plaudit.report.charts import Series, line_chart
from plaudit.report.run_data import read_run
from plaudit.report.run_page import different_settings, render_run, render_runs, script_json
from plaudit.settings.report import CompareConfig, ReportConfig
from plaudit.stages import report

NASTY = '</script><script>document.title="ran"</script><img src=x onerror=alert(1)><!-- & "q" \u2028'
N = 8


def answer(step: int, row: int, *, gain: float, judge_gain: float) -> dict[str, Any]:
    return {
        "step": step,
        "row": row,
        "prompt": f"prompt {row}",
        "response": NASTY if row == 0 else f"words {row}",
        "reward": row / N + gain * step,
        "judges": {"other": -row / N + judge_gain * step},
        "kl": 0.5 * step,
        "length": 5,
        "finish_reason": "length",
    }


def evaluation(step: int, gain: float) -> dict[str, float]:
    figures = {"reward": gain * step, "kl": 0.5 * step, "length": 5.0, "win_rate": 0.5, "ended_share": 0.0}
    figures |= {"other/reward": 0.0, "other/win_rate": 0.5}
    ends = {f"{name}{end}": value for name, value in figures.items() for end in ("_low", "_high")}
    return {"step": step, **{f"eval/{name}": value for name, value in (figures | ends).items()}}


def write_run(directory: Path, *, gain: float = 1.0, judge_gain: float = 0.0, watch: bool = True) -> Path:
    directory.mkdir(parents=True)
    settings = {"seed": 0, "steps": 4, "policy": f"<b>{gain}</b>", "watch": {"eval_every": 2, "best_by": "reward"}}
    (directory / "run.json").write_text(json.dumps(settings))
    rows = [{"step": step, "env/reward_mean": gain * step, "objective/kl": 0.5 * step} for step in range(4)]
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if watch:
        records = [evaluation(step, gain) for step in (0, 2, 4)]
        (directory / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in records))
        (directory / "held-out").mkdir()
        for step in (0, 2, 4):
            lines = [json.dumps(answer(step, row, gain=gain, judge_gain=judge_gain)) for row in range(N)]
            (directory / "held-out" / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def samples_in(document: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', document, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def test_a_hostile_text_is_data_and_comes_back_as_it_was(tmp_path: Path) -> None:
    document = render_run(read_run(write_run(tmp_path / "run")))
    # The page's own two scripts, and no element of the text.
    assert len(re.findall("<script", document)) == len(re.findall("</script", document)) == 2
    assert "<img" not in document
    assert "<!--" not in document
    assert "<b>" not in document
    rows = samples_in(document)["rows"]
    assert rows[0][3] == NASTY
    assert len(rows) == 3 * N


def test_script_json_has_no_character_that_html_reads() -> None:
    text = script_json([NASTY])
    assert not set("<>&") & set(text)
    assert json.loads(text) == [NASTY]


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, gain=gain)) for name, gain in (("a", 1.0), ("b", 2.0))]
    for document in (render_run(runs[0]), render_runs(runs)):
        page = re.sub(r'id="samples-data">.*?</script>', "", document, flags=re.S)
        assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?://|fetch\(|XMLHttp", page)
        assert "prefers-color-scheme: dark" in document


def test_the_best_evaluation_and_the_audit_are_on_the_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", gain=-1.0))
    document = render_run(run)
    assert run.best is not None
    assert run.best["step"] == 0
    assert "best: step 0" in document
    assert "Audit for over-optimisation" in document
    # Rewards rise with the row, the judge's scores fall with it.
    assert run.audits()[4]["other/correlation"] == pytest.approx(-1)
    assert run.audits()[4]["distinct_share"] == 1
    assert "that difference may be chance" in document


def test_changes_are_paired_by_prompt() -> None:
    first = [answer(0, row, gain=1, judge_gain=0) for row in range(N)]
    last = [answer(4, row, gain=0.5, judge_gain=0) for row in range(N)]
    found = {change.name: change for change in held_out_changes(first, last)}
    # Each prompt's reward rose by exactly 2, so its interval has no width though the rewards differ.
    assert found["reward"].ci95 == pytest.approx((2, 2))
    assert found["reward"].direction == 1
    assert found["other"].direction == 0
    assert found["KL"].last == 2


def test_the_direction_needs_the_whole_interval() -> None:
    assert Changed("x", 0.0, 1.0, (-0.1, 2.1)).direction == 0
    assert Changed("x", 0.0, 1.0, (0.1, 1.9)).direction == 1
    assert Changed("x", 1.0, 0.0, (-1.9, -0.1)).direction == -1
    assert Changed("x", 1.0, 0.0, None).direction == -1


def test_the_paragraph_says_that_a_judge_did_not_follow(tmp_path: Path) -> None:
    alone = " ".join(paragraph(read_run(write_run(tmp_path / "alone"))))
    assert "these went up: reward (0.44 to 4.44, difference +4.00 (+4.00 to +4.00)), KL" in alone
    assert "The reward rose and other did not" in alone
    together = " ".join(paragraph(read_run(write_run(tmp_path / "together", judge_gain=1.0))))
    assert "The other judges rose with the reward" in together
    bare = " ".join(paragraph(read_run(write_run(tmp_path / "bare", watch=False))))
    assert "without intervals" in bare
    assert "a higher reward alone does not show" in bare


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    run = read_run(tmp_path)
    assert changes(run) == []
    assert "not enough steps" in render_run(run)
    with pytest.raises(ConfigError, match="holds no run"):
        read_run(tmp_path / "nowhere")


def test_runs_beside_each_other(tmp_path: Path) -> None:
    directories = [write_run(tmp_path / name, gain=gain) for name, gain in (("a", 1.0), ("b", 2.0))]
    runs = [read_run(directory) for directory in directories]
    assert different_settings(runs) == {"policy": "<b>1.0</b> | <b>2.0</b>"}
    page = report.run(CompareConfig(tuple(directories), file=tmp_path / "new" / "page.html"))
    data = samples_in(page.read_text())
    assert [column["name"] for column in data["columns"]][:2] == ["run", "step"]
    assert {row[0] for row in data["rows"]} == {str(directory) for directory in directories}
    # Other prompts are not put beside each other.
    shutil.rmtree(directories[1] / "held-out")
    assert "samples-data" not in render_runs([read_run(directory) for directory in directories])
    with pytest.raises(ConfigError, match="1 runs to compare"):
        report.run(CompareConfig((directories[0],)))


def test_a_report_is_made_again_at_any_time(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", watch=False)
    (directory / "rollouts").mkdir()
    row = answer(0, 0, gain=1, judge_gain=0) | {"advantage": 0.1}
    (directory / "rollouts" / "from-step-000000.jsonl").write_text(json.dumps(row) + "\n")
    page = report.run(ReportConfig(directory))
    assert page == directory / "training.html"
    assert samples_in(page.read_text())["rows"][0][3] == NASTY
    # A line that is being written while the page is made.
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "env/rew')
    assert "4 PPO steps" in report.run(ReportConfig(directory)).read_text()


def test_of_many_rollouts_some_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_run(tmp_path / "run", watch=False)
    (directory / "rollouts").mkdir()
    for step in range(6):
        row = answer(step, 0, gain=1, judge_gain=0) | {"advantage": 0.1, "response_tokens": [1, 2]}
        (directory / "rollouts" / f"from-step-{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    size = (directory / "rollouts" / "from-step-000000.jsonl").stat().st_size
    assert [row["step"] for row in read_run(directory).rollouts] == list(range(6))
    monkeypatch.setattr(run_data, "MOST_BYTES", 3 * size)
    rollouts = read_run(directory).rollouts
    assert [row["step"] for row in rollouts] == [0, 2, 4]
    assert all("response_tokens" not in row for row in rollouts)


def test_a_chart_of_one_point_a_constant_and_a_hostile_name_is_drawn() -> None:
    svg = line_chart("<t>", [Series("<x>", [3], [1.0], "red"), Series("y", [1, 2], [5.0, 5.0], "blue", points=True)])
    assert "<t>" not in svg
    assert "&lt;x&gt;, step 3: 1" in svg
    assert svg.count("<circle") == 3
    assert "nan" not in line_chart("empty", [])
    # Values that differ by rounding alone.
    assert "1.00" in line_chart("t", [Series("s", [1, 2], [0.9999999999999997, 1.0], "red")])
    assert "0" in line_chart("t", [Series("s", [1, 2], [0.0, 0.0], "red")])


def test_a_chart_puts_values_where_they_belong() -> None:
    svg = line_chart("t", [Series("s", [0, 10], [0.0, 1.0], "red")])
    (points,) = re.findall(r'class="line"[^>]* points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    # The axes of 440 x 230: 50 to 428, and 200 up to 12.
    assert (x0, y0, x1, y1) == (50, 200, 428, 12)
