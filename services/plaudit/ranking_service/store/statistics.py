"""The agreement statistics of a batch, from the newest version of each ranking."""

from plaudit.ranking_service.agreement import Activity, report
from plaudit.ranking_service.store import files
from plaudit.ranking_service.store.database import Database
from plaudit.wire import rankings as wire


def agreement_of(database: Database, batch: str) -> wire.AgreementReport:
    """Agreement and reliability in one batch. Takes seconds for thousands of rankings: don't call on the event loop."""
    said: dict[str, dict[str, list[int]]] = {}
    seconds: dict[str, list[float]] = {}
    counts: dict[str, dict[str, int]] = {}
    with database.read() as connection:
        for row in files.export(connection, [batch], late=False, history=False):
            if row.status == "withdrawn":
                continue
            done = counts.setdefault(row.annotator, {"ranked": 0, "skipped": 0, "flagged": 0})
            if row.ranks:
                # Answers with the same text are shown once, and form no pair.
                said.setdefault(row.task, {})[row.annotator] = [row.ranks[i] for i in sorted(row.shown_order)]
                seconds.setdefault(row.annotator, []).append(row.seconds)
            done[row.status if row.status in done else "ranked"] += 1
    activity = {
        annotator: Activity(done["ranked"], done["skipped"], done["flagged"], seconds.get(annotator, []))
        for annotator, done in counts.items()
    }
    return report(batch, said, activity)
