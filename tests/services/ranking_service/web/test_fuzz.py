"""What nobody would send: no answer may be 5xx, and nothing may be recorded."""

import json
import random
from typing import Any
from urllib.parse import urlencode

import pytest

from harness.ranking_service import ADMIN, ClientOf, in_shown_order, rows, upload
from plaudit.ranking_service.store import batches
from plaudit.ranking_service.store.database import Database, now_ms

pytestmark = pytest.mark.anyio
REQUESTS = 1500
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x",
    "\x00",
    "\ud800",
    "9" * 5000,
    [],
    {},
    [[[[]]]],
    {"a": {"b": []}},
)
TYPES = ("application/json", "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-16", "")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def damaged(draw: random.Random, body: dict[str, object]) -> bytes:
    """The body with something wrong in it."""
    changed = dict(body)
    for _ in range(draw.randrange(1, 3)):
        name = draw.choice([*changed, "other"])
        if draw.random() < 0.2:
            changed.pop(name, None)
        else:
            changed[name] = draw.choice(VALUES)
    if draw.random() < 0.3:
        fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changed.items()}
        return urlencode(fields, errors="surrogatepass").encode()
    data = bytearray(json.dumps(changed).encode())
    if draw.random() < 0.3 and data:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


async def test_no_damage_to_a_request_is_a_failure_of_the_service(database: Database, client_of: ClientOf) -> None:
    draw = random.Random(11)
    listed = rows(2)
    with database.write() as connection:
        batches.upload(database, connection, upload(listed, overlap_share=0), now_ms())
    async with client_of(database) as http:
        token = (await http.post("/v1/annotators", json={}, headers=ADMIN)).json()["token"]
        me = {"authorization": f"Bearer {token}"}
        task = (await http.get("/", headers=me | {"accept": "application/json"})).json()
        at = f"/a/{task['assignment']}"
        ranking = {"key": "k", "version": 7, "ranks": in_shown_order(task), "note": ""}
        targets = [
            ("POST", f"{at}/ranking", me, ranking),
            ("POST", f"{at}/skip", me, {"key": "k", "version": 7}),
            ("POST", f"{at}/flag", me, {"key": "k", "version": 7, "flags": ["other"]}),
            ("POST", f"{at}/undo", me, {"key": "k", "version": 0}),
            ("PUT", f"{at}/draft", me, {"version": 0, "ranks": {}, "note": ""}),
            ("POST", "/v1/batches", ADMIN, json.loads(upload(listed, id="b1").model_dump_json())),
            ("POST", "/i", {}, {"link": "x", "then": "/a/x", "key": "k"}),
            ("POST", "/sign-out", {}, {"csrf": "x"}),
            *(("POST", path, ADMIN | me, {}) for path in ("/a/%00/skip", "/i/%00", "/v1/batches/%00/close")),
            *(("POST", path, ADMIN, {}) for path in ("/v1/annotators/%00/link", f"/v1/batches/{'x' * 5000}/close")),
            ("GET", "/v1/batches/%00/rankings", ADMIN, {}),
            ("DELETE", "/v1/annotators/%ff%00", ADMIN, {}),
            ("POST", "/admin/batches/b1/close", {}, {"csrf": "x"}),
        ]
        for _ in range(REQUESTS):
            method, path, headers, body = draw.choice(targets)
            sent = headers | {"content-type": draw.choice(TYPES), "accept": draw.choice(["text/html", "*/*", ""])}
            answer = await http.request(method, path, content=damaged(draw, body), headers=sent)
            assert answer.status_code < 500, (method, path, answer.text)
        assert (await http.get("/v1/batches/b1/rankings", headers=ADMIN)).json()["rows"] == []
