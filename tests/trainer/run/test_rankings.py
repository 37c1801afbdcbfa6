"""The ranking service's client: what is sent again, what is not, and how a refusal reads."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from harness.ranking_service import KEY, RankingService, rows, upload
from plaudit.errors import ConfigError
from plaudit.run import rankings
from plaudit.run.rankings import RankingAdmin, RankingPerson, RankingsRejected, RankingsUnavailable, read_key
from plaudit.wire import rankings as wire

UPLOADED = wire.BatchUploaded(id="b1", added=1, known=0, merged_answers=0, identical=0, tasks=1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankings, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("RANK_API_KEY", KEY)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RankingService]:
    running = RankingService(str(tmp_path / "service.db"))
    yield running
    running.kill()


def scripted(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that gives these answers in turn, and what it was asked."""
    asked: list[httpx.Request] = []
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        next_one = left.pop(0)
        if isinstance(next_one, Exception):
            raise next_one
        return next_one

    return httpx.MockTransport(answer), asked


def admin(transport: httpx.BaseTransport, **settings: object) -> RankingAdmin:
    return RankingAdmin("http://rank:8100/", patience_s=5, transport=transport, **settings)  # type: ignore[arg-type]


def ok() -> httpx.Response:
    return httpx.Response(201, content=UPLOADED.model_dump_json())


def test_an_upload_that_got_no_answer_is_sent_again_as_it_was() -> None:
    transport, asked = scripted(httpx.ConnectError("refused"), httpx.Response(503), httpx.ReadTimeout("late"), ok())
    waited: list[str] = []
    with admin(transport, on_wait=waited.append) as service:
        assert service.upload(upload(rows(1))) == UPLOADED
    assert len({request.content for request in asked}) == 1
    assert asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(waited) == 3
    assert "http://rank:8100: refused" in waited[0]


def test_patience_that_runs_out_names_the_service_and_how_long() -> None:
    down = httpx.MockTransport(lambda request: httpx.Response(503, json={"detail": "the database is locked"}))
    said = pytest.raises(RankingsUnavailable, match=r"no answer for 0.01 s \(http://rank:8100: 503: .*locked")
    with RankingAdmin("http://rank:8100", patience_s=0.01, transport=down) as service, said:
        service.progress("b1")


def test_no_wait_begins_that_would_outlast_the_patience() -> None:
    transport, asked = scripted(httpx.Response(429, headers={"retry-after": "3600"}))
    with admin(transport) as service, pytest.raises(RankingsUnavailable):
        service.progress("b1")
    assert len(asked) == 1


def test_a_refusal_is_not_sent_again_and_says_what_the_service_said() -> None:
    problem = {"type": "t", "title": "t", "status": 422, "detail": "row 7: half a ranking; nothing was taken"}
    transport, asked = scripted(httpx.Response(422, json=problem))
    said = r"POST http://rank:8100/v1/batches is refused \(422\): row 7: half"
    with admin(transport) as service, pytest.raises(RankingsRejected, match=said):
        service.upload(upload(rows(1)))
    assert len(asked) == 1


def test_an_answer_of_something_else_is_refused_with_its_place() -> None:
    transport, _ = scripted(httpx.Response(200, json={"hello": "world"}))
    with admin(transport) as service, pytest.raises(RankingsRejected, match="is that address a ranking service"):
        service.progress("b1")


def test_of_two_versions_of_a_ranking_the_newer_one_is_kept_whatever_page_it_is_on() -> None:
    def row(version: int, ranks: list[int]) -> wire.RankingRow:
        task = rows(1, k=2)[0]
        return wire.RankingRow(
            id=f"r{version}", task=task.id, group=task.group, batch="b1", prompt=task.prompt, answers=task.answers,
            ranks=ranks, annotator="a1", status="counted", shown_order=[0, 1], at="2026-01-01T00:00:00.000Z",
            version=version,
        )  # fmt: skip

    pages = [
        wire.RankingsPage(rows=[row(2, [2, 1])], after=5, more=True),
        wire.RankingsPage(rows=[row(1, [1, 2])], after=9, more=False),
    ]
    transport, asked = scripted(*(httpx.Response(200, content=page.model_dump_json()) for page in pages))
    with admin(transport) as service:
        (found,) = service.rankings("b1")
    assert found.ranks == [2, 1]
    assert [request.url.params["after"] for request in asked] == ["0", "5"]


@pytest.mark.parametrize(("content", "words"), [(None, "can't be read"), ("", "no key"), ("schlüssel", "no key")])
def test_a_key_file_that_cant_be_used_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"api_key_file={path} .*{words}"):
        read_key(path)


def test_without_a_file_the_key_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(None) == KEY
    monkeypatch.delenv("RANK_API_KEY")
    with pytest.raises(ConfigError, match="RANK_API_KEY holds no key"):
        read_key(None)


def test_a_person_signs_in_by_the_link_and_ranks_with_cookie_and_csrf_token(service: RankingService) -> None:
    service.upload(rows(2))
    with RankingAdmin(service.url, patience_s=5) as administration:
        link = administration.invitation("Ada")
    with RankingPerson(service.url, link, patience_s=5) as person:
        task = person.next_task()
        assert isinstance(task, wire.TaskView)
        ranks = {answer.id: place for place, answer in enumerate(task.answers, start=1)}
        first, again = person.rank(task, ranks), person.rank(task, ranks)
        assert (first.status, first.replayed, again.replayed) == ("counted", False, True)
        other = person.next_task()
        assert isinstance(other, wire.TaskView)
        assert person.skip(other).status == "skipped"
        assert person.next_task() == wire.NoTask(waiting=False)
    assert [row["ranks"] for row in service.rankings() if row["status"] == "counted"] != []


def test_an_answer_that_is_lost_on_the_way_is_asked_for_again_and_recorded_once(service: RankingService) -> None:
    service.upload(rows(1))
    link = service.invite().link
    real = httpx.HTTPTransport()

    class Losing(httpx.BaseTransport):
        """The first ranking arrives, and its answer doesn't."""

        lost = 0

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = real.handle_request(request)
            if request.url.path.endswith("/ranking") and not self.lost:
                self.lost += 1
                answer.close()
                raise httpx.ReadError("connection lost")
            return answer

        def close(self) -> None:
            real.close()

    transport = Losing()
    with RankingPerson(service.url, link, patience_s=5, transport=transport) as person:
        task = person.next_task()
        assert isinstance(task, wire.TaskView)
        accepted = person.rank(task, {answer.id: 1 for answer in task.answers})
    assert transport.lost == 1
    assert accepted.replayed
    assert len(service.rankings()) == 1


def test_the_same_name_is_the_same_person_under_a_new_link(service: RankingService) -> None:
    with RankingAdmin(service.url, patience_s=5) as administration:
        first, second, other = (administration.invitation(name) for name in ("Ada", "Ada", "Bao"))
    assert len({first, second, other}) == 3
    with service.admin() as http:
        assert [info["name"] for info in http.get("/v1/annotators").json()] == ["Ada", "Bao"]
    with RankingPerson(service.url, first, patience_s=5) as person, pytest.raises(RankingsRejected, match="404"):
        person.next_task()


def test_a_session_that_has_ended_is_begun_again(service: RankingService) -> None:
    service.upload(rows(1))
    with RankingPerson(service.url, service.invite().link, patience_s=5) as person:
        task = person.next_task()
        assert isinstance(task, wire.TaskView)
        person._headers["cookie"] = person._headers["cookie"].partition("=")[0] + "=ended"
        assert person.rank(task, {answer.id: 1 for answer in task.answers}).status == "counted"


def test_sessions_that_need_https_are_refused_on_plain_http_with_what_to_do() -> None:
    cookie = {"set-cookie": "__Host-plaudit=x; HttpOnly; Path=/; Secure", "location": "/"}
    transport, _ = scripted(httpx.Response(303, headers=cookie))
    refused = pytest.raises(RankingsRejected, match="--no-secure-cookies")
    with RankingPerson("http://rank", "http://rank/i/t", patience_s=1, transport=transport) as person, refused:
        person.next_task()


def test_pieces_hold_every_row_once_in_order() -> None:
    listed = rows(5)
    pieces: Callable[[int], list[list[wire.AnswersRow]]] = lambda size: rankings.answers_in_pieces(listed, size)  # noqa: E731
    assert [len(piece) for piece in pieces(2)] == [2, 2, 1]
    assert [row for piece in pieces(2) for row in piece] == listed
