"""The routes: what programs get, what forms get back, keys, sessions, other sites, bounds."""

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from sqlalchemy import select

from harness.ranking_service import ADMIN, ClientOf, in_shown_order, rows, upload
from plaudit.ranking_service.store import batches, people
from plaudit.ranking_service.store.database import Database, StoreUnavailableError, now_ms
from plaudit.ranking_service.store.schema import audit
from plaudit.ranking_service.web import view
from plaudit.wire import rankings as wire

pytestmark = pytest.mark.anyio
PAGE = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FORM = {**PAGE, "content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
JSON = {"accept": "application/json"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def http(sqlite: Database, client_of: ClientOf) -> AsyncIterator[httpx.AsyncClient]:
    """A client with three tasks behind it, and nobody signed in."""
    with sqlite.write() as connection:
        batches.upload(sqlite, connection, upload(rows(3), overlap_share=0), now_ms())
    async with client_of(sqlite) as client:
        yield client


async def invite(http: httpx.AsyncClient, **wanted: Any) -> wire.Invited:
    answer = await http.post("/v1/annotators", json=wanted, headers=ADMIN)
    assert answer.status_code == 201
    return wire.Invited.model_validate_json(answer.content)


async def as_program(http: httpx.AsyncClient) -> dict[str, str]:
    """The headers of a program that ranks."""
    return {"authorization": f"Bearer {(await invite(http)).token}", **JSON}


async def sign_in(http: httpx.AsyncClient, **wanted: Any) -> str:
    """Sign a browser in; the token of the invitation."""
    invited = await invite(http, **wanted)
    answer = await http.post(f"/i/{invited.token}", headers=FORM)
    assert answer.status_code == 303
    return invited.token


def fields_of(page: str) -> dict[str, str]:
    """The hidden and filled fields of the first form with an assignment, as a browser would send them."""
    form = page[page.index('<form id="rank"') :]
    found = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))
    found |= dict(re.findall(r'<input type="radio" name="([^"]+)" value="(\d)" checked>', form))
    return found


def action_of(page: str) -> str:
    found = re.search(r'<form id="rank"[^>]* action="(/a/\w+/ranking)"', page)
    assert found is not None
    return found[1]


def radio_names(page: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r'type="radio" name="([^"]+)"', page)))


async def test_a_program_ranks_by_its_invitation_alone(http: httpx.AsyncClient) -> None:
    me = await as_program(http)
    task = (await http.get("/", headers=me)).json()
    body = {"key": task["key"], "version": task["version"], "ranks": in_shown_order(task), "seconds": 3.5}
    answer = await http.post(f"/a/{task['assignment']}/ranking", json=body, headers=me)
    assert answer.json() == {
        "assignment": task["assignment"],
        "version": 1,
        "status": "counted",
        "replayed": False,
    }
    again = await http.post(f"/a/{task['assignment']}/ranking", json=body, headers=me)
    assert again.json()["replayed"]
    assert "policy" not in str(task)
    rankings = (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()
    assert [row["seconds"] for row in rankings["rows"]] == [3.5]


async def test_the_messages_of_the_service_are_those_of_the_wire(http: httpx.AsyncClient) -> None:
    me = await as_program(http)
    wire.TaskView.model_validate_json((await http.get("/", headers=me)).content)
    wire.BatchProgress.model_validate_json((await http.get("/v1/batches/b1", headers=ADMIN)).content)
    wire.RankingsPage.model_validate_json((await http.get("/v1/batches/b1/rankings", headers=ADMIN)).content)
    wire.AgreementReport.model_validate_json((await http.get("/v1/batches/b1/agreement", headers=ADMIN)).content)
    for info in (await http.get("/v1/annotators", headers=ADMIN)).json():
        wire.AnnotatorInfo.model_validate(info)


async def test_looking_at_an_invitation_uses_nothing_up(http: httpx.AsyncClient) -> None:
    token = (await invite(http)).token
    for _ in range(3):
        looked = await http.get(f"/i/{token}", headers=PAGE)
        assert looked.status_code == 200
        assert "set-cookie" not in looked.headers
    assert (await http.post(f"/i/{token}", headers=FORM)).status_code == 303
    assert (await http.post(f"/i/{token}", headers=FORM)).status_code == 303


async def test_the_session_cookie_is_out_of_reach(http: httpx.AsyncClient) -> None:
    token = (await invite(http)).token
    cookie = (await http.post(f"/i/{token}", headers=FORM)).headers["set-cookie"]
    assert cookie.startswith("__Host-plaudit=")
    for part in ("HttpOnly", "Secure", "SameSite=lax", "Path=/"):
        assert part in cookie
    assert token not in cookie


async def test_tokens_are_stored_as_hashes_alone(http: httpx.AsyncClient, sqlite: Database) -> None:
    token = await sign_in(http, name="Ada")
    assert sqlite.sqlite_path is not None
    stored = b"".join(path.read_bytes() for path in sqlite.sqlite_path.parent.glob("rankings.db*"))
    assert token.encode() not in stored
    assert http.cookies["__Host-plaudit"].encode() not in stored
    assert b"Ada" in stored


async def test_a_form_is_recorded_without_any_script(http: httpx.AsyncClient, sqlite: Database) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    form = fields_of(page) | dict.fromkeys(radio_names(page), "2") | {"note": "Two\r\nlines"}
    answer = await http.post(action_of(page), content=urlencode(form), headers=FORM)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    (row,) = (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()["rows"]
    assert (row["ranks"], row["note"]) == ([1, 1, 1, 1], "Two\nlines")


async def test_half_a_ranking_comes_back_filled_and_says_what_is_missing(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    first, second, *_ = radio_names(page)
    form = fields_of(page) | {first: "3", second: "1", "note": "so far & <so> good"}
    answer = await http.post(action_of(page), content=urlencode(form), headers=FORM)
    assert answer.status_code == 422
    assert "Give every answer a rank first" in answer.text
    again = fields_of(answer.text)
    assert (again[first], again[second]) == ("3", "1")
    assert "so far &amp; &lt;so&gt; good" in answer.text


async def test_a_session_that_has_ended_keeps_the_work_and_goes_on_by_a_pasted_link(
    http: httpx.AsyncClient,
) -> None:
    token = await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    form = fields_of(page) | {name: str(i) for i, name in enumerate(radio_names(page), start=1)}
    http.cookies.clear()
    ended = await http.post(action_of(page), content=urlencode(form), headers=FORM)
    assert ended.status_code == 401
    assert "Your session has ended" in ended.text
    hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', ended.text))
    assert {name: hidden[name] for name in radio_names(page)} == {name: form[name] for name in radio_names(page)}
    pasted = await http.post(
        "/i", content=urlencode(hidden | {"link": f" https://rank.example/i/{token} "}), headers=FORM
    )
    assert pasted.status_code == 200
    assert "nothing is lost" in pasted.text
    done = await http.post(action_of(pasted.text), content=urlencode(fields_of(pasted.text)), headers=FORM)
    assert done.status_code == 303
    (row,) = (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()["rows"]
    assert sorted(row["ranks"]) == [1, 2, 3, 4]


async def test_two_edits_of_one_ranking_show_both(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    names = radio_names(page)
    first = fields_of(page) | dict(zip(names, "1234", strict=True))
    assert (await http.post(action_of(page), content=urlencode(first), headers=FORM)).status_code == 303
    second = fields_of(page) | dict(zip(names, "4411", strict=True)) | {"key": "another"}
    conflict = await http.post(action_of(page), content=urlencode(second), headers=FORM)
    assert conflict.status_code == 409
    assert "<dd>A, then B, then C, then D</dd>" in conflict.text
    assert "<dd>C and D (tied), then A and B (tied)</dd>" in conflict.text
    replaced = await http.post(action_of(page), content=urlencode(fields_of(conflict.text)), headers=FORM)
    assert replaced.status_code == 303
    (row,) = (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()["rows"]
    assert row["version"] == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
async def test_another_site_can_send_nothing(http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    form = fields_of(page) | dict.fromkeys(radio_names(page), "1")
    sent = {key: value for key, value in FORM.items() if key != "sec-fetch-site"} | headers
    answer = await http.post(action_of(page), content=urlencode(form), headers=sent)
    assert answer.status_code == 403
    assert (await http.get("/v1/batches/b1", headers=ADMIN)).json()["counted"] == 0


async def test_a_form_without_the_sessions_token_comes_back_filled(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    form = fields_of(page) | dict(zip(radio_names(page), "1234", strict=True)) | {"csrf": "wrong"}
    refused = await http.post(action_of(page), content=urlencode(form), headers=FORM)
    assert refused.status_code == 403
    assert (await http.post(action_of(page), content=urlencode(fields_of(refused.text)), headers=FORM)).is_redirect


async def test_every_page_forbids_what_it_does_not_need(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    first, second = [await http.get("/", headers=PAGE) for _ in range(2)]
    policy = first.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    nonces = [re.findall(r"nonce-([\w-]+)", answer.headers["content-security-policy"])[0] for answer in (first, second)]
    assert nonces[0] != nonces[1]
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "no-store"
    assert " style=" not in first.text
    assert not re.findall(r"\son\w+=", first.text)


async def test_a_page_with_its_files_has_at_most_30_kb_and_asks_nobody_else(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = await http.get("/", headers=PAGE)
    size = len(page.content)
    for path in set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)):
        file = await http.get(path)
        assert "immutable" in file.headers["cache-control"]
        size += len(file.content)
    assert size <= 30_000
    assert not re.findall(r'(?:src|href|action)="(?!/|#)', page.text)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "\u202eevil\u202c",
    "NUL \x00 \x1b[31m",
)


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_texts_are_shown_as_texts(sqlite: Database, client_of: ClientOf, text: str) -> None:
    row = wire.new_answers_row(
        "b1", [wire.Turn(role="user", content=text)], [wire.new_answer(text), wire.new_answer("other")]
    )
    with sqlite.write() as connection:
        batches.upload(sqlite, connection, upload([row], instructions=text), now_ms())
    async with client_of(sqlite) as http:
        await sign_in(http)
        page = (await http.get("/", headers=PAGE)).text
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "{{ 7 * 7 }}" in page or "7 * 7" not in text
    assert "\x00" not in page
    assert "\x1b" not in page


def test_a_long_text_is_folded_at_a_paragraph_and_nothing_is_lost() -> None:
    text = "\n\n".join(f"Paragraph {i} " + "word " * 60 for i in range(30))
    body = view.body(text)
    assert body.head + body.rest == text
    assert body.rest.startswith("\n\nParagraph")
    assert len(body.head) <= view.LONG_CHARS


def test_a_transcript_in_a_text_is_shown_as_turns() -> None:
    told = view.turns("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Well?")
    assert [(role, body.head) for role, _, body in told] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Well?"),
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches"),
        ("GET", "/v1/batches/b1"),
        ("GET", "/v1/batches/b1/rankings"),
        ("GET", "/v1/batches/b1/agreement"),
        ("POST", "/v1/batches/b1/close"),
        ("POST", "/v1/annotators"),
        ("GET", "/v1/annotators"),
        ("DELETE", "/v1/annotators/p-x"),
        ("GET", "/metrics"),
        ("GET", "/admin"),
    ],
)
async def test_the_administration_wants_a_key_or_an_administrator(
    http: httpx.AsyncClient, method: str, path: str
) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert (await http.request(method, path, headers=headers)).status_code == 401
    annotator = {"authorization": f"Bearer {(await invite(http)).token}"}
    assert (await http.request(method, path, headers=annotator)).status_code == 403


async def test_an_administrator_signs_in_and_closes_a_batch(http: httpx.AsyncClient) -> None:
    await sign_in(http, role="admin", name="Root")
    page = (await http.get("/admin", headers=PAGE)).text
    csrf = re.search(r'name="csrf" value="(\w+)"', page)
    assert csrf is not None
    assert (await http.post("/admin/batches/b1/close", content="csrf=wrong", headers=FORM)).status_code == 403
    done = await http.post("/admin/batches/b1/close", content=urlencode({"csrf": csrf[1]}), headers=FORM)
    assert done.status_code == 303
    assert (await http.get("/v1/batches/b1", headers=ADMIN)).json()["closed_at"] is not None
    assert "Reopen" in (await http.get("/admin", headers=PAGE)).text


async def test_a_session_alone_changes_nothing_over_the_json_routes(http: httpx.AsyncClient) -> None:
    await sign_in(http, role="admin")
    assert (await http.post("/v1/batches/b1/close")).status_code == 403


@pytest.mark.parametrize(
    ("spoil", "status", "said"),
    [
        (lambda body: body[:-5], 400, "malformed-body"),
        (lambda body: body.replace('"Prompt 1"', "17"), 422, "row 2: prompt"),
        (lambda body: body.replace('"overlap":3', '"overlap":0'), 422, "overlap"),
        (lambda body: body.replace('"id":"b1","round"', '"id":"../x","round"'), 422, "id"),
        (lambda body: body.replace('"split":"train"', '"split":"train","who":1'), 422, "row 1: who: Extra inputs"),
        (lambda body: body.replace("Answer 0 to prompt 2.", r"\ud800"), 422, "row 3: answers.0"),
    ],
)
async def test_an_upload_with_a_wrong_row_is_refused_whole_and_says_which(
    sqlite: Database, client_of: ClientOf, spoil: Any, status: int, said: str
) -> None:
    async with client_of(sqlite) as http:
        body = spoil(upload(rows(3)).model_dump_json())
        answer = await http.post("/v1/batches", content=body, headers=ADMIN)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert said in answer.text
        assert (await http.get("/v1/batches", headers=ADMIN)).json() == []


async def test_bodies_have_a_bound(sqlite: Database, client_of: ClientOf) -> None:
    async with client_of(sqlite, max_body_bytes=1000) as http:
        answer = await http.post("/v1/batches", content=b" " * 1001, headers=ADMIN)
        assert (answer.status_code, answer.json()["type"]) == (413, "urn:plaudit:problem:body-too-large")
        me = await as_program(http)
        long = await http.post(
            "/a/x/ranking", content=b" " * 300_000, headers=me | {"content-type": "application/json"}
        )
        assert long.status_code == 413

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 500

        assert (await http.post("/v1/batches", content=endless(), headers=ADMIN)).status_code == 413


async def test_a_person_and_an_address_have_a_limit(sqlite: Database, client_of: ClientOf) -> None:
    async with client_of(sqlite, requests_per_minute=3) as http:
        me, other = await as_program(http), await as_program(http)
        answers = [await http.get("/", headers=me) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert (await http.get("/", headers=other)).status_code == 200
    async with client_of(sqlite, requests_per_minute_address=2) as http:
        answers = [await http.get("/i/guess", headers=PAGE) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [404, 404, 429]
        assert (await http.get("/livez")).status_code == 200


async def test_a_database_that_is_gone_is_told_with_a_time_to_come_again(
    sqlite: Database, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite.write() as connection:
        batches.upload(sqlite, connection, upload(rows(1)), now_ms())
    async with client_of(sqlite) as http:
        me = await as_program(http)
        await sign_in(http)
        page = (await http.get("/", headers=PAGE)).text
        task = (await http.get("/", headers=me)).json()

        def gone() -> Any:
            raise StoreUnavailableError("the database can't be used now: disk full")

        monkeypatch.setattr(sqlite, "write", gone)
        body = {"key": "k", "version": 0, "ranks": in_shown_order(task)}
        answer = await http.post(f"/a/{task['assignment']}/ranking", json=body, headers=me)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        form = fields_of(page) | dict(zip(radio_names(page), "1234", strict=True))
        kept = await http.post(action_of(page), content=urlencode(form), headers=FORM)
        assert (kept.status_code, kept.headers["retry-after"]) == (503, "5")
        assert "Not sent yet" in kept.text
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', kept.text))
        assert hidden == form
        monkeypatch.undo()
        assert (await http.post(action_of(page), content=urlencode(hidden), headers=FORM)).status_code == 303


async def test_health_says_what_is_wrong(
    sqlite: Database, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(sqlite) as http:
        assert (await http.get("/livez")).json() == {"status": "ok"}
        assert (await http.get("/readyz")).json() == {"status": "ok"}

        def gone() -> None:
            raise StoreUnavailableError("no route to the database")

        monkeypatch.setattr(sqlite, "ping", gone)
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()["detail"]) == (503, "no route to the database")
        assert (await http.get("/livez")).status_code == 200


async def test_metrics_count_what_was_said(http: httpx.AsyncClient) -> None:
    me = await as_program(http)
    task = (await http.get("/", headers=me)).json()
    body = {"key": "k", "version": 0, "ranks": in_shown_order(task)}
    for _ in range(2):
        await http.post(f"/a/{task['assignment']}/ranking", json=body, headers=me)
    told = (await http.get("/metrics", headers=ADMIN)).text
    assert 'plaudit_rank_submissions_total{status="counted"} 1.0' in told
    assert "plaudit_rank_replayed_submissions_total 1.0" in told
    assert 'plaudit_rank_rankings_counted{batch="b1"} 1.0' in told


async def test_a_new_link_ends_the_old_one_and_its_sessions(http: httpx.AsyncClient) -> None:
    invited = await invite(http)
    await http.post(f"/i/{invited.token}", headers=FORM)
    made = (await http.post(f"/v1/annotators/{invited.annotator}/link", headers=ADMIN)).json()
    assert (await http.get("/mine", headers=JSON)).status_code == 401
    assert (await http.get(f"/i/{invited.token}", headers=PAGE)).status_code == 404
    assert (await http.get(f"/i/{made['token']}", headers=PAGE)).status_code == 200


async def test_a_person_who_is_deleted_is_gone(http: httpx.AsyncClient, sqlite: Database) -> None:
    invited = await invite(http, name="Ada Lovelace")
    await http.post(f"/i/{invited.token}", headers=FORM)
    assert (await http.delete(f"/v1/annotators/{invited.annotator}", headers=ADMIN)).status_code == 204
    assert (await http.get("/mine", headers=JSON)).status_code == 401
    assert (await http.delete(f"/v1/annotators/{invited.annotator}", headers=ADMIN)).status_code == 404
    with sqlite.read() as connection:
        (left,) = people.everybody(connection)
    assert (left.name, left.disabled) == ("", True)
    assert left.annotator != invited.annotator


async def test_a_session_ends_after_its_time(sqlite: Database, client_of: ClientOf) -> None:
    async with client_of(sqlite, session_hours=1e-9) as http:
        await sign_in(http)
        assert (await http.get("/mine", headers=JSON)).json()["type"] == "urn:plaudit:problem:session-ended"


async def test_signing_out_ends_the_session(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = (await http.get("/mine", headers=PAGE)).text
    csrf = re.search(r'name="csrf" value="(\w+)"', page)
    assert csrf is not None
    before = dict(http.cookies)
    await http.post("/sign-out", content=urlencode({"csrf": csrf[1]}), headers=FORM)
    http.cookies.update(before)
    assert (await http.get("/mine", headers=JSON)).status_code == 401


async def test_a_ranking_can_be_taken_back_from_the_list(http: httpx.AsyncClient) -> None:
    await sign_in(http)
    page = (await http.get("/", headers=PAGE)).text
    form = fields_of(page) | dict(zip(radio_names(page), "1234", strict=True))
    await http.post(action_of(page), content=urlencode(form), headers=FORM)
    mine = (await http.get("/mine", headers=PAGE)).text
    undo = re.search(r'<form method="post" action="(/a/\w+/undo)">(.*?)</form>', mine, re.DOTALL)
    assert undo is not None
    fields = dict(re.findall(r'name="(\w+)" value="([^"]*)"', undo[2]))
    assert (await http.post(undo[1], content=urlencode(fields), headers=FORM)).status_code == 303
    (row,) = (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()["rows"]
    assert (row["status"], row["ranks"]) == ("withdrawn", [])


async def test_the_audit_says_who_did_what_without_texts_or_names(http: httpx.AsyncClient, sqlite: Database) -> None:
    await sign_in(http, name="Ada Lovelace", role="admin")
    await http.post("/v1/batches", content=upload(rows(5), overlap_share=0).model_dump_json(), headers=ADMIN)
    await http.post("/v1/batches/b1/close", headers=ADMIN)
    with sqlite.read() as connection:
        written = [(row.action, row.object, row.detail) for row in connection.execute(select(audit))]
    assert [action for action, _, _ in written] == ["upload", "invite", "upload", "close"]
    assert "Ada" not in str(written)
    assert "Prompt" not in str(written)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("PUT", "/v1/batches", 405), ("GET", "/v1/batches/nope", 404), ("GET", "/static/x", 404)],
)
async def test_what_is_not_there_is_a_problem_document(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path, headers=ADMIN)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


@pytest.mark.parametrize("query", ["after=-1", "after=x", "limit=99999", "after=" + "9" * 40])
async def test_a_cursor_that_is_none_is_refused(http: httpx.AsyncClient, query: str) -> None:
    answer = await http.get(f"/v1/batches/b1/rankings?{query}", headers=ADMIN)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:plaudit:problem:invalid-request")


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("ranking", {"key": "k", "version": 0, "ranks": {"x": 1}}, "unknown-answer"),
        ("ranking", {"key": "k", "version": 0}, "invalid-request"),
        ("ranking", {"key": "k k", "version": 0, "ranks": {}}, "invalid-request"),
        ("flag", {"key": "k", "version": 0, "flags": []}, "invalid-request"),
        ("flag", {"key": "k", "version": 0, "flags": ["boring"]}, "invalid-request"),
        ("undo", {"key": "k", "version": 0}, "nothing-to-undo"),
        ("dance", {}, "not-found"),
    ],
)
async def test_a_submission_that_is_none_is_refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], name: str
) -> None:
    me = await as_program(http)
    task = (await http.get("/", headers=me)).json()
    answer = await http.post(f"/a/{task['assignment']}/{path}", json=body, headers=me)
    assert answer.json()["type"] == f"urn:plaudit:problem:{name}"
