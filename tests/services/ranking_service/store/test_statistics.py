"""From rankings in the database to the report of a batch."""

import pytest
from scipy import stats

from harness.annotators import Tasks, people_who_rank
from harness.ranking_service import rows
from plaudit.ranking_service.store import files
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.statistics import agreement_of
from plaudit.wire import rankings as wire


def as_rows(tasks: Tasks) -> list[wire.RankingRow]:
    """What simulated people said, as a rankings file has it."""
    return [
        wire.RankingRow(
            **row.model_dump(exclude={"id"}),
            id=f"{row.id}-{who}",
            task=row.id,
            ranks=ranks,
            annotator=who,
            status="counted",
            seconds=10.0,
            shown_order=list(range(len(ranks))),
            at="2026-01-02T03:04:05.678Z",
            version=1,
        )
        for row, said in zip(rows(len(tasks)), tasks, strict=True)
        for who, ranks in said.items()
    ]


def test_the_reliability_of_ten_simulated_people_is_found(sqlite: Database) -> None:
    said = as_rows(people_who_rank(0))
    with sqlite.write() as connection:
        files.import_rows(sqlite, connection, said, now_ms())
    report = agreement_of(sqlite, "b1")
    assert (report.rankings, report.overlapping_tasks) == (1200, 240)
    found = {person.annotator: person for person in report.annotators}
    reliability = [found[f"p{i}"].reliability for i in range(10)]
    assert stats.spearmanr(reliability, range(10)).statistic <= -0.9
    assert found["p9"].weight is not None
    assert found["p9"].weight < 0.2
    assert report.alpha.low is not None
    assert report.alpha.low > 0


@pytest.mark.parametrize("status", ["skipped", "flagged"])
def test_skips_and_flags_are_counted_and_compared_with_nothing(sqlite: Database, status: wire.Status) -> None:
    one, other = as_rows([{"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}])
    with sqlite.write() as connection:
        files.import_rows(sqlite, connection, [one, other.model_copy(update={"status": status, "ranks": []})], now_ms())
    report = agreement_of(sqlite, "b1")
    assert (report.rankings, report.overlapping_tasks) == (1, 0)
    first, second = report.annotators
    assert (first.rankings, getattr(second, status)) == (1, 1)
