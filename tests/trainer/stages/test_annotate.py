"""Simulated annotators in the real service: everything is ranked, deterministically, and who is careless is found."""

import dataclasses
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.ranking_service import KEY, RankingService
from harness.tiny_models import tiny_classifier_dir
from plaudit import cli, errors
from plaudit.errors import ConfigError
from plaudit.rewards.settings import RewardSettings
from plaudit.run import annotator
from plaudit.run.rankings import RankingsUnavailable
from plaudit.settings.annotate import AnnotateConfig
from plaudit.stages import annotate
from plaudit.wire import rankings as wire


@pytest.fixture
def config(service: RankingService) -> AnnotateConfig:
    reward = RewardSettings.of(function="harness.judges:named_value")
    return AnnotateConfig(url=service.url, reward=reward, annotators=4, temperature=(0.5,), patience_s=20, seed=3)


def valued_rows(n: int, k: int = 4) -> list[wire.AnswersRow]:
    """Answers that end with their value: 0, 1, ..."""
    return [
        wire.new_answers_row("b1", f"Prompt {i}", [wire.new_answer(f"Answer worth {j}") for j in range(k)])
        for i in range(n)
    ]


def said(service: RankingService) -> dict[tuple[str, str], list[int]]:
    """Ranks by the name of the person and the prompt."""
    with service.admin() as http:
        names = {info["annotator"]: info["name"] for info in http.get("/v1/annotators").json()}
    return {(names[row["annotator"]], row["prompt"]): row["ranks"] for row in service.rankings()}


def test_everything_is_ranked_and_the_figures_are_the_services(
    config: AnnotateConfig, service: RankingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.upload(valued_rows(20), overlap=2, overlap_share=0.5)
    result = annotate.run(config)
    progress = service.progress()
    assert progress["complete"]
    assert result.ranked == progress["counted"] + progress["surplus"] == 30
    assert "4 annotators submitted 30 rankings (30 counted)" in capsys.readouterr().out


def test_people_without_noise_rank_as_the_judge_does(config: AnnotateConfig, service: RankingService) -> None:
    service.upload(valued_rows(5))
    annotate.run(dataclasses.replace(config, temperature=(0.0,)))
    assert {tuple(ranks) for ranks in said(service).values()} == {(4, 3, 2, 1)}


def test_with_a_margin_the_answers_next_to_each_other_tie(config: AnnotateConfig, service: RankingService) -> None:
    service.upload(valued_rows(5))
    annotate.run(dataclasses.replace(config, temperature=(0.0,), tie_margin=(1.0,)))
    assert {tuple(ranks) for ranks in said(service).values()} == {(2, 2, 1, 1)}


def test_the_same_seed_says_the_same_however_many_work_at_once(
    config: AnnotateConfig, service: RankingService, tmp_path: Path
) -> None:
    everybody = {"overlap": 4, "overlap_share": 1.0}
    service.upload(valued_rows(8), **everybody)
    annotate.run(config)
    first = said(service)
    assert len(first) == 4 * 8
    other = RankingService(str(tmp_path / "other.db"))
    try:
        other.upload(valued_rows(8), **everybody)
        annotate.run(dataclasses.replace(config, url=other.url, concurrency=1))
        assert said(other) == first
    finally:
        other.kill()


def test_a_second_run_is_the_same_people_and_goes_on(config: AnnotateConfig, service: RankingService) -> None:
    service.upload(valued_rows(12))
    assert annotate.run(dataclasses.replace(config, limit=1)).ranked == 4
    assert not service.progress()["complete"]
    annotate.run(config)
    assert service.progress()["complete"]
    with service.admin() as http:
        names = sorted(info["name"] for info in http.get("/v1/annotators").json())
    assert names == [f"simulated 3.{i}" for i in range(4)]


def test_skips_are_made_and_counted(config: AnnotateConfig, service: RankingService) -> None:
    service.upload(valued_rows(10))
    result = annotate.run(dataclasses.replace(config, skips=(1.0,), annotators=3))
    assert result.ranked == 0
    assert service.progress()["parked"] == 10
    assert result.statuses["skipped"] == 30


def test_whoever_waits_for_a_task_that_a_stranger_holds_stops_and_says_so(
    config: AnnotateConfig, service: RankingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.upload(valued_rows(1), overlap=1)
    with service.annotator() as stranger:
        assert stranger.get("/").json()["assignment"] is not None
    result = annotate.run(dataclasses.replace(config, patience_s=0.3, annotators=2))
    assert (result.ranked, result.waiting) == (0, 2)
    assert "2 of them stopped while others still held tasks" in capsys.readouterr().out


def test_people_take_turns_so_that_nobody_does_it_all(config: AnnotateConfig, service: RankingService) -> None:
    service.upload(valued_rows(20), overlap=1)
    annotate.run(dataclasses.replace(config, concurrency=2))
    shares = Counter(person for person, _ in said(service))
    assert len(shares) == 4
    assert max(shares.values()) <= 7


def test_a_service_that_goes_away_ends_the_run_with_75(
    config: AnnotateConfig, service: RankingService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service.upload(valued_rows(20))
    turn = annotator.Annotator.turn
    first = threading.Lock()

    def kills(self: annotator.Annotator) -> annotator.Turn:
        if self.statuses.total() == 1 and first.acquire(blocking=False):
            service.kill()
        return turn(self)

    monkeypatch.setattr(annotator.Annotator, "turn", kills)
    with pytest.raises(RankingsUnavailable, match=r"gave no answer for 0\.3 s"):
        annotate.run(dataclasses.replace(config, patience_s=0.3, concurrency=3))


def test_the_reliability_of_ten_people_is_found(config: AnnotateConfig, service: RankingService) -> None:
    rows = [
        wire.new_answers_row(
            "b1", f"Prompt {i}", [wire.new_answer(f"Worth {(i * 7 + j * 3) % 11 / 5}") for j in range(4)]
        )
        for i in range(60)
    ]
    service.upload(rows, overlap=10, overlap_share=1.0)
    temperatures = (0.05, 0.2, 0.4, 0.65, 0.95, 1.3, 1.8, 2.5, 4.0, 0.2)
    careless = (*[0.0] * 9, 1.0)
    result = annotate.run(
        dataclasses.replace(config, annotators=10, temperature=temperatures, carelessness=careless, concurrency=5)
    )
    assert result.ranked == 600
    with service.admin() as http:
        report = http.get("/v1/batches/b1/agreement").json()
        names = {info["annotator"]: info["name"] for info in http.get("/v1/annotators").json()}
    found = {int(names[person["annotator"]].rpartition(".")[2]): person for person in report["annotators"]}
    true_order = range(10)  # from the least noise to none of the answers' own
    reliabilities = [found[i]["reliability"] for i in true_order]
    assert found[9]["weight"] < 0.2
    assert spearman(reliabilities, [-i for i in true_order]) >= 0.9


def spearman(a: list[float], b: list[int]) -> float:
    places = [[sorted(values).index(value) for value in values] for values in (a, b)]
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*places, strict=True)) / (n * (n**2 - 1))


def test_a_classifier_on_disk_is_scored_here_as_its_own_logits(tmp_path: Path) -> None:
    path = tiny_classifier_dir(tmp_path)
    config = AnnotateConfig(judge=str(path))
    answers = ["a great film", "the worst story and the acting was boring"]
    with annotate.judging(config) as judge:
        scores = judge("this movie", answers)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        alone = [model(**tokenizer("this movie" + text, return_tensors="pt")).logits[0, 1].item() for text in answers]
    assert scores == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_classifiers_of_other_families_judge_too(tmp_path: Path, family: str) -> None:
    path = tiny_classifier_dir(tmp_path, family=family)
    with annotate.judging(AnnotateConfig(judge=str(path))) as judge:
        together = judge("this", ["a film", "a film that was good and great and not bad"])
        assert together[0] == pytest.approx(judge("this", ["a film"])[0], abs=1e-4)


def test_a_model_with_one_logit_has_that_one(tmp_path: Path) -> None:
    path = tiny_classifier_dir(tmp_path, labels=("LABEL_0",))
    with annotate.judging(AnnotateConfig(judge=str(path))) as judge:
        assert len(judge("this", ["a film", "a story"])) == 2


def test_a_judge_without_the_label_is_refused_with_the_labels_there_are(tmp_path: Path) -> None:
    path = tiny_classifier_dir(tmp_path)
    refused = pytest.raises(ConfigError, match="no label 'HAPPY'; its labels are NEGATIVE, POSITIVE")
    with refused, annotate.judging(AnnotateConfig(judge=str(path), label="HAPPY")):
        pass


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "the annotators have no judge: name a classifier with --judge, or a reward endpoint"),
        (["--judge", "/nowhere/judge"], "judge='/nowhere/judge' is no classifier that loads"),
        (["--temperature", "0.1", "0.2"], "temperature has 2 values for annotators=5"),
        (["--carelessness", "1.5"], "carelessness=1.5 must lie between 0 and 1"),
        (["--tie-margin", "-1"], "tie_margin=-1.0 must lie at 0 or above"),
        (["--url", "rank:8100"], "url='rank:8100' must start with http"),
        (["--judge", "x", "--reward.url", "http://127.0.0.1:9"], "leave one out"),
    ],
)
def test_what_cant_work_is_one_line(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.setenv("RANK_API_KEY", KEY)
    assert cli.run(["annotate", *flags]) == errors.EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
