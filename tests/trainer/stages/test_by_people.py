"""Judging by people: blind, paired, over the real service, and resumable while people take their time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from harness.judges import vowels
from harness.ranking_service import RankingService
from harness.tiny_models import tiny_gpt2_dir
from plaudit import cli, errors
from plaudit.data.sources import load_texts
from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.run.rankings import RankingsRejected, RankingsUnavailable
from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.data import DataSettings, PromptSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.people import PeopleSettings
from plaudit.settings.policy import GenerationSettings
from plaudit.stages import annotate, by_people, evaluate
from plaudit.stages.by_people import PeopleResult
from plaudit.wire import rankings as wire

N = 24
NO_AGREEMENT: dict[str, Any] = {"value": None, "low": None, "high": None}


@pytest.fixture
def config(policy_dir: Path, reviews: Path, service: RankingService, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        after=str(tiny_gpt2_dir(tmp_path / "after", seed=1)),
        policy=str(policy_dir),
        output_dir=tmp_path / "out",
        dataset=DataSettings(str(reviews), held_out_fraction=0.3),
        prompts=PromptSettings(min_tokens=6, max_tokens=12),
        generation=GenerationSettings(batch_size=16),
        by_people=service.url,
        people=PeopleSettings(overlap=3, overlap_share=0.5),
        people_patience_s=0.0,
        people_poll_s=0.05,
        n_prompts=N,
    )


def ten_annotators(config: EvaluateConfig, **settings: Any) -> annotate.AnnotateResult:
    assert config.by_people is not None
    reward = RewardSettings.of(function="harness.judges:vowels")
    values: dict[str, Any] = {"temperature": (0.0,), "annotators": 10, "patience_s": 20.0} | settings
    return annotate.run(AnnotateConfig(url=config.by_people, reward=reward, **values))


def asked(config: EvaluateConfig) -> list[wire.AnswersRow]:
    lines = (config.output_dir / "people-answers.jsonl").read_text().splitlines()
    return [wire.AnswersRow.model_validate_json(line) for line in lines]


def people(config: EvaluateConfig) -> PeopleResult:
    result = evaluate.run(config)
    assert isinstance(result, PeopleResult)
    return result


def test_ten_people_judge_before_and_after_from_end_to_end(
    config: EvaluateConfig, service: RankingService, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankingsUnavailable, match=r"people have ranked 0 of \d+ in batch 'evaluation-"):
        evaluate.run(config)
    assert ten_annotators(config).ranked >= N
    result = people(config)
    rows = asked(config)
    won = [
        0.5 if a == b else float(b > a)
        for row in rows
        for a, b in [vowels(["", ""], [answer.text for answer in row.answers])]
    ]
    assert result.win_rate.mean == pytest.approx(sum(won) / N)
    assert result.win_rate.ci95[0] < result.win_rate.mean < result.win_rate.ci95[1]
    assert (result.prompts, result.unjudged, result.annotators) == (N, 0, 10)
    assert result.agreement["pair_agreement"]["value"] == 1
    written = json.loads((config.output_dir / "people.json").read_text())
    assert written["win_rate"]["mean"] == result.win_rate.mean
    assert len((config.output_dir / "people-rankings.jsonl").read_text().splitlines()) == result.rankings
    printed = capsys.readouterr().out
    for words in ("win rate, ties 1/2", "agreement (95 % interval), by chance", str(config.output_dir / "people.json")):
        assert words in printed


def test_people_see_both_answers_and_not_which_policy_wrote_which(
    config: EvaluateConfig, service: RankingService
) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    with service.annotator() as person:
        task = person.get("/").text
        page = person.get("/", headers={"accept": "text/html"}).text
    for shown in (task, page):
        for word in ("before", "after", config.after, str(config.policy)):
            assert word not in shown


def test_the_prompts_are_held_out_ones_and_say_so(config: EvaluateConfig) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    rows = asked(config)
    held_out = {wire.group_of(text) for text in load_texts(config.dataset, "held_out")}
    assert {row.group for row in rows} <= held_out
    assert {row.split for row in rows} == {"held_out"}


def test_noisy_people_give_ties_and_an_agreement_below_1(config: EvaluateConfig) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    ten_annotators(config, temperature=(1.0,), tie_margin=(0.5,))
    result = people(config)
    assert 0 < result.tied_rankings < 1
    assert result.win_rate.ties > 0
    agreement = result.agreement["pair_agreement"]
    assert agreement["low"] <= agreement["value"] < 1


def test_a_run_that_goes_on_generates_nothing_and_asks_about_the_same_answers(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    monkeypatch.setattr(evaluate, "both_answers", lambda config: pytest.fail("answered again"))
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)


def test_the_command_says_how_to_go_on_and_exits_with_75(
    config: EvaluateConfig, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.by_people is not None
    flags = ["--after", config.after, "--policy", str(config.policy), "--data", str(reviews), "--n-prompts", "5"]
    more = ["--output-dir", str(config.output_dir), "--by-people", config.by_people, "--people-patience-s", "0"]
    command = ["evaluate", *flags, *more]
    assert cli.run(command) == errors.EXIT_UNAVAILABLE
    error = capsys.readouterr().err
    assert "people have ranked 0 of" in error
    assert f"plaudit {' '.join(command)}" in error
    ten_annotators(config)
    assert cli.run(command) == 0


def test_a_closed_batch_is_judged_as_far_as_people_came(config: EvaluateConfig, service: RankingService) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    ten_annotators(config, limit=1)
    batch = asked(config)[0].batch
    with service.admin() as http:
        assert http.post(f"/v1/batches/{batch}/close").is_success
    result = people(config)
    assert result.rankings == 10
    assert result.unjudged == N - result.win_rate.prompts > 0


def test_other_settings_in_the_same_directory_are_refused(config: EvaluateConfig) -> None:
    with pytest.raises(RankingsUnavailable):
        evaluate.run(config)
    with pytest.raises(ConfigError, match="holds another evaluation by people, with seed=0 and not 1"):
        evaluate.run(dataclasses.replace(config, seed=1))


def rows() -> list[wire.AnswersRow]:
    texts = [("same", "same"), ("bad", "good"), ("poor", "fine"), ("x", "y")]
    return [
        wire.new_answers_row(
            "b", f"P{i}", [wire.new_answer(a, policy="before"), wire.new_answer(b, policy="after", seed=1)]
        )
        for i, (a, b) in enumerate(texts)
    ]


def word(row: wire.AnswersRow, *ranks: int, who: str = "p1", status: wire.Status = "counted") -> wire.RankingRow:
    return wire.RankingRow(
        id=f"{row.id}{who}", task=row.id, group=row.group, batch="b", prompt=row.prompt, answers=row.answers,
        ranks=list(ranks), annotator=who, status=status, shown_order=[0, 1], at="2026-01-01T00:00:00.000Z", version=1,
    )  # fmt: skip


def no_agreement() -> wire.AgreementReport:
    names = ("pair_agreement", "kappa", "tau_b", "alpha")
    return wire.AgreementReport(
        batch="b", rankings=0, overlapping_tasks=0, pairs_compared=0, tie_rate=None, chance=None, tau_b_undefined=0,
        annotators=[], **{name: wire.Estimate(**NO_AGREEMENT) for name in names},
    )  # fmt: skip


def test_identical_answers_are_ties_skips_say_nothing_and_unjudged_prompts_are_counted() -> None:
    listed = rows()
    said = [
        word(listed[1], 2, 1),
        word(listed[1], 1, 1, who="p2", status="surplus"),
        word(listed[2], 1, 2),
        word(listed[3], status="skipped"),
    ]
    result = by_people.judge(listed, said, no_agreement())
    assert result.win_rate.prompts == 3
    assert result.win_rate.mean == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert (result.identical, result.unjudged, result.rankings, result.annotators) == (1, 1, 3, 2)
    assert result.tied_rankings == pytest.approx(1 / 3)


def test_an_evaluation_in_which_nobody_ranked_has_no_figures() -> None:
    with pytest.raises(RankingsRejected, match="nobody has ranked anything"):
        by_people.judge(rows(), [word(rows()[1], status="skipped")], no_agreement())


def test_two_policies_that_answer_alike_have_no_figures() -> None:
    with pytest.raises(RankingsRejected, match="the same answer to each of the 1 prompts"):
        by_people.judge(rows()[:1], [], no_agreement())


def test_people_and_rewards_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        EvaluateConfig(by_people="http://127.0.0.1:8100", reward=RewardSettings.of(url=("http://127.0.0.1:8000",)))
