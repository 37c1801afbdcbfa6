"""What the service promises when something fails, against the real program on both databases."""

import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.machine.disks import fill, small_disk
from harness.machine.postgres import PostgresServer
from harness.ranking_service import RankingService, in_shown_order, rows


@pytest.fixture
def on_both(database_url: str) -> Iterator[RankingService]:
    running = RankingService(database_url)
    running.upload(rows(5), overlap_share=0)
    yield running
    running.kill()


def submission(task: dict[str, Any]) -> dict[str, Any]:
    return {"key": task["key"], "version": task["version"], "ranks": in_shown_order(task)}


def test_a_kill_after_the_record_and_before_the_answer_leaves_one_record(on_both: RankingService) -> None:
    with on_both.annotator() as me:
        task = me.get("/").json()
        url = f"/a/{task['assignment']}/ranking"
        assert me.post(url, json=submission(task)).json()["replayed"] is False
        # To the page, an answer that never came is the same as one that was lost here.
        on_both.kill(signal.SIGKILL)
        on_both.start()
        again = me.post(url, json=submission(task))
        assert (again.status_code, again.json()["replayed"]) == (200, True)
    assert len(on_both.rankings()) == 1


def test_kills_while_people_send_lose_nothing_that_was_answered(on_both: RankingService) -> None:
    on_both.upload(rows(40), overlap_share=0)
    answered: list[str] = []
    done = threading.Event()

    def work(me: httpx.Client) -> None:
        while not done.is_set():
            try:
                task = me.get("/").json()
                if task["assignment"] is None:
                    return
                if me.post(f"/a/{task['assignment']}/ranking", json=submission(task)).is_success:
                    answered.append(task["task"])
            except httpx.HTTPError:
                continue

    people = [on_both.annotator() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(me,)) for me in people]
    for thread in threads:
        thread.start()
    for least in (5, 15):
        while len(answered) < least:
            pass
        on_both.kill(signal.SIGKILL)
        on_both.start()
    for thread in threads:
        thread.join()
    for me in people:
        me.close()
    found = [row["task"] for row in on_both.rankings()]
    assert set(answered) <= set(found)
    assert len(found) == len(set(found)) == 40


def test_two_tabs_make_one_version(on_both: RankingService) -> None:
    with on_both.annotator() as me:
        task = me.get("/").json()
        other_tab = me.get("/").json()
        assert other_tab == task | {"lease_until": other_tab["lease_until"]}
        url = f"/a/{task['assignment']}/ranking"
        answers = [me.post(url, json=submission(tab)).json() for tab in (task, other_tab)]
        assert [answer["replayed"] for answer in answers] == [False, True]
        assert {answer["version"] for answer in answers} == {1}


def test_two_edits_of_one_ranking_are_a_conflict_with_both(on_both: RankingService) -> None:
    with on_both.annotator() as me:
        task = me.get("/").json()
        url = f"/a/{task['assignment']}/ranking"
        one = submission(task)
        other = one | {"key": "other", "ranks": dict.fromkeys(one["ranks"], 1)}
        assert me.post(url, json=one).is_success
        conflict = me.post(url, json=other)
        assert conflict.status_code == 409
        assert conflict.json()["recorded"] == {"kind": "ranking", "ranks": one["ranks"]}
        assert conflict.json()["sent"] == {"kind": "ranking", "ranks": other["ranks"]}


def test_a_batch_that_has_been_closed_keeps_what_comes_as_late(on_both: RankingService) -> None:
    with on_both.annotator() as me, on_both.admin() as admin:
        task = me.get("/").json()
        assert admin.post("/v1/batches/b1/close").is_success
        assert me.post(f"/a/{task['assignment']}/ranking", json=submission(task)).json()["status"] == "late"
        assert me.get("/").json() == {"assignment": None, "waiting": False}
    assert on_both.rankings() == []
    assert [row["status"] for row in on_both.rankings(late="true")] == ["late"]


def test_postgres_that_goes_and_comes_back(postgres: PostgresServer) -> None:
    running = RankingService(postgres.url())
    try:
        running.upload(rows(2), overlap_share=0)
        with running.annotator() as me:
            task = me.get("/").json()
            url = f"/a/{task['assignment']}/ranking"
            postgres.stop()
            ready = httpx.get(f"{running.url}/readyz", timeout=30)
            assert (ready.status_code, ready.json()["type"]) == (503, "urn:plaudit:problem:not-ready")
            assert httpx.get(f"{running.url}/livez").status_code == 200
            refused = me.post(url, json=submission(task))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            postgres.start()
            assert me.post(url, json=submission(task)).json()["status"] == "counted"
            assert httpx.get(f"{running.url}/readyz", timeout=30).status_code == 200
    finally:
        if postgres.stopped:
            postgres.start()
        running.kill()


def test_a_full_disk_is_503_and_the_same_request_is_recorded_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 3072) as disk:
        running = RankingService(str(disk / "full.db"))
        try:
            running.upload(rows(2), overlap_share=0)
            with running.annotator() as me:
                task = me.get("/").json()
                url = f"/a/{task['assignment']}/ranking"
                filler = fill(disk)
                # What room the journal still has is soon used up by drafts.
                draft = {"version": 0, "ranks": {}, "note": "x" * 4000}
                while me.put(f"/a/{task['assignment']}/draft", json=draft).is_success:
                    pass
                refused = me.post(url, json=submission(task) | {"note": "x" * 4000})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
                assert "full" in refused.json()["detail"]
                filler.unlink()
                assert me.post(url, json=submission(task) | {"note": "x" * 4000}).json()["replayed"] is False
            assert len(running.rankings()) == 1
        finally:
            running.kill()


def test_a_database_that_another_program_locks_for_too_long_is_503(service: RankingService) -> None:
    service.upload(rows(1))
    with service.annotator() as me:
        task = me.get("/").json()
        url = f"/a/{task['assignment']}/ranking"
        with closing(sqlite3.connect(service.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            refused = me.post(url, json=submission(task), timeout=60)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            other.execute("ROLLBACK")
        assert me.post(url, json=submission(task)).is_success
