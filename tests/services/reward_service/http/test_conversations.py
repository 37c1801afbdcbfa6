"""Conversations and fields over the wire, and requests from before there were any."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgpack
import pytest

from harness.scorers import FakeScorer
from plaudit import wire
from plaudit.reward_service.engine.batching import Chat, Encoded, Engine, Scored, Text
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.http.service import ServiceLimits

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
ITEM = {"prompt": MESSAGES, "response": "Hello"}


class ChatScorer(FakeScorer):
    """The first logit is the length of all turns, roles included."""

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        encoded = []
        for text in texts:
            assert isinstance(text, Chat)
            refused = "no such role" if "pirate" in dict(text.turns) else None
            encoded.append(Encoded([7] * sum(len(role) + len(said) for role, said in text.turns), refused=refused))
        return encoded


def size(*turns: tuple[str, str]) -> float:
    return float(sum(len(role) + len(said) for role, said in turns))


@pytest.fixture
def ask(make_engine: Callable[..., Engine], client_of: Callable[..., Any]) -> Callable[..., httpx.Response]:
    """POST to a fresh service over a fake scorer and give back its answer."""

    def send(
        body: Any = None,
        *,
        join: wire.Join = "chat",
        headers: dict[str, str] | None = None,
        method: str = "POST",
        path: str = wire.REWARDS_PATH,
        **options: Any,
    ) -> httpx.Response:
        async def run() -> httpx.Response:
            engine = make_engine(ChatScorer() if join == "chat" else FakeScorer())
            async with client_of(engine, default_label="LENGTH", join=join, **options) as http:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return await http.request(
                    method, path, content=content, headers={"content-type": "application/json"} | (headers or {})
                )

        return asyncio.run(run())

    return send


def problem_of(response: httpx.Response) -> wire.Problem:
    return wire.Problem.model_validate_json(response.content)


def test_messages_and_a_text_are_turns_that_end_with_the_response(ask: Callable[..., httpx.Response]) -> None:
    answer = ask({"items": [ITEM, {"prompt": "Hi", "response": "Hello", "fields": {"answer": [1, {"a": None}]}}]})
    whole = size(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
    assert answer.json()["rewards"] == [whole, size(("user", "Hi"), ("assistant", "Hello"))]


@pytest.mark.parametrize("padding", [0, 40_000])
def test_in_msgpack_and_in_json_of_any_size_the_rewards_are_the_same(
    ask: Callable[..., httpx.Response], padding: int
) -> None:
    """A body of more than 32 KiB is read by another parser."""
    body = {"items": [ITEM, {**ITEM, "fields": {"long": "x" * padding, "more": [1.5, True, None, {"a": "b"}]}}]}
    by_json = ask(body).json()
    by_msgpack = ask(msgpack.packb(body), headers={"content-type": "application/msgpack", "accept": "application/json"})
    assert by_json["rewards"] == by_msgpack.json()["rewards"] == [size(("system", "Be kind."), ("user", "Hi")) + 14] * 2


@pytest.mark.parametrize("join", ["concat", "pair"])
def test_messages_for_a_service_that_takes_strings_are_refused_by_item(
    ask: Callable[..., httpx.Response], join: wire.Join
) -> None:
    problem = problem_of(ask({"items": [{"prompt": "a", "response": "b"}, ITEM]}, join=join))
    assert (problem.status, problem.type, problem.item) == (422, wire.problem_type("strings-only"), 1)
    assert f"--join {join} and takes strings; start it with --join chat" in problem.detail


VLLM_BODY = {"messages": [*MESSAGES, {"role": "assistant", "content": "Hello"}], "use_activation": False}


def test_vllms_messages_are_judged_like_the_same_conversation_over_the_wire(ask: Callable[..., httpx.Response]) -> None:
    [expected] = ask({"items": [ITEM]}).json()["rewards"]
    [classified] = ask({**VLLM_BODY, "model": "any"}, path="/classify").json()["data"]
    assert (classified["index"], classified["label"], classified["probs"][0]) == (0, "LENGTH", expected)
    [pooled] = ask({**VLLM_BODY, "task": "classify"}, path="/pooling").json()["data"]
    assert pooled["data"][0] == expected
    [activated] = ask({**VLLM_BODY, "use_activation": True}, path="/classify").json()["data"]
    assert sum(activated["probs"]) == pytest.approx(1)


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt=true is not supported"),
        ({"chat_template": "{{ messages }}"}, "chat_template is not supported: start the service with --chat-template"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "pirate", "content": "Arr"}]}, "no such role"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "more than 1000 characters"),
    ],
)
def test_vllms_messages_that_would_be_read_otherwise_are_refused(
    ask: Callable[..., httpx.Response], path: str, more: dict[str, Any], words: str
) -> None:
    answer = ask({**VLLM_BODY, **more}, path=path, limits=ServiceLimits(max_text_chars=1000))
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_vllms_messages_need_join_chat(ask: Callable[..., httpx.Response]) -> None:
    answer = ask(VLLM_BODY, path="/classify", join="concat")
    assert answer.status_code == 400
    assert "start it with --join chat" in answer.json()["error"]["message"]


def test_a_template_that_refuses_an_item_names_it(ask: Callable[..., httpx.Response]) -> None:
    problem = problem_of(ask({"items": [ITEM, {**ITEM, "prompt": [{"role": "pirate", "content": "Arr"}]}]}))
    assert (problem.status, problem.type, problem.item) == (422, wire.problem_type("template-refused"), 1)
    assert "no such role" in problem.detail


@pytest.mark.parametrize(
    ("bad", "name"), [("", "no-tokens"), ("poison", "scoring-failed"), ("nan", "non-finite-score")]
)
def test_beside_items_whose_scores_are_known_the_one_at_fault_keeps_its_index(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any], bad: str, name: str
) -> None:
    async def run() -> httpx.Response:
        async with client_of(make_engine(), default_label="LENGTH", cache=ScoreCache(10)) as http:
            known = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "bc"}]
            await http.post(wire.REWARDS_PATH, json={"items": known})
            return await http.post(wire.REWARDS_PATH, json={"items": [*known, {"prompt": "", "response": bad}]})

    problem = problem_of(asyncio.run(run()))
    assert (problem.type, problem.item) == (wire.problem_type(name), 2)
    assert "items[2]" in problem.detail


DEEP: Any = 1
for _ in range(wire.MAX_FIELD_DEPTH + 1):
    DEEP = [DEEP]
TURN = {"role": "user", "content": "abc"}
REFUSED: dict[str, tuple[Any, str, str]] = {
    "no prompt at all": ({"prompt": 3, "response": "a"}, "invalid-request", "a string or a list of messages"),
    "no messages": ({"prompt": [], "response": "a"}, "invalid-request", "items[1].prompt"),
    "a message without a role": ({"prompt": [{"content": "a"}], "response": "a"}, "invalid-request", "prompt[0].role"),
    "an unknown key": (
        {"prompt": [{**TURN, "name": "x"}], "response": "a"},
        "invalid-request",
        "items[1].prompt[0].name",
    ),
    "a message that is a text": ({"prompt": ["a"], "response": "a"}, "invalid-request", "items[1].prompt[0]"),
    "content in parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "response": "a"},
        "invalid-request",
        "prompt[0].content",
    ),
    "messages too long together": ({"prompt": [TURN] * 7, "response": "a"}, "text-too-long", "items[1]"),
    "too many messages": (
        {"prompt": [{"role": "user", "content": ""}] * 1025, "response": "a"},
        "invalid-request",
        "items[1].prompt",
    ),
    "fields that are no object": ({"prompt": "a", "response": "a", "fields": [1]}, "invalid-request", "an object"),
    "too many fields": (
        {"prompt": "a", "response": "a", "fields": {f"f{i}": 1 for i in range(65)}},
        "invalid-request",
        "65 fields; at most 64",
    ),
    "a field nested too deep": ({"prompt": "a", "response": "a", "fields": {"x": DEEP}}, "invalid-request", "16 deep"),
    "too many values": (
        {"prompt": "a", "response": "a", "fields": {"x": [1] * 4097}},
        "invalid-request",
        "more than 4096 values",
    ),
    "too many characters": (
        {"prompt": "a", "response": "a", "fields": {"x": "y" * 1_000_001}},
        "invalid-request",
        "more than 1000000 characters",
    ),
}


@pytest.mark.parametrize("padding", [0, 40_000], ids=["small", "large"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_names_the_item_and_why(ask: Callable[..., httpx.Response], what: str, padding: int) -> None:
    item, name, said = REFUSED[what]
    first = {"prompt": "a", "response": "b", "fields": {"padding": "x" * padding}}
    problem = problem_of(ask({"items": [first, item]}, limits=ServiceLimits(max_text_chars=20)))
    assert (problem.status, problem.type, problem.item) == (422, wire.problem_type(name), 1)
    assert said in problem.detail


@pytest.mark.parametrize("text", [r"\ud800", "NaN", "Infinity"])
def test_a_field_that_is_no_json_is_refused_by_item(ask: Callable[..., httpx.Response], text: str) -> None:
    value = f'"{text}"' if text.startswith("\\") else text
    body = '{"items": [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "fields": {"x": V}}]}'
    body = body.replace("V", value)
    problem = problem_of(ask(body.encode(), join="concat"))
    assert (problem.status, problem.item) == (422, 1)
    assert "'x'" in problem.detail


OLD_REQUESTS = [
    (b'{"items":[{"prompt":"This movie","response":" was wonderful."}],"label":"MINUS"}', [-25.0]),
    (b'{"items":[{"prompt":"","response":"x"},{"prompt":"ab","response":"cde"}],"label":null}', [1.0, 5.0]),
    (b'{"items": [{"prompt": "ab", "response": "cde"}]}', [5.0]),
]
"""As clients of version 1 send them."""


@pytest.mark.parametrize(("body", "rewards"), OLD_REQUESTS)
def test_an_old_request_has_the_answer_that_it_always_had(
    ask: Callable[..., httpx.Response], body: bytes, rewards: list[float]
) -> None:
    answer = ask(body, join="concat").json()
    assert answer["rewards"] == rewards
    assert list(answer) == ["rewards", "model", "revision", "label", "truncated"]


def test_the_version_is_told_to_clients_that_say_theirs_and_to_no_other(ask: Callable[..., httpx.Response]) -> None:
    old = ask(b"", method="GET", path=wire.MODEL_PATH, headers={wire.REQUEST_ID_HEADER: "1"}).json()
    known_to_version_1 = ["id", "revision", "labels", "default_label", "join", "dtype", "limits", "request_id"]
    assert list(old) == known_to_version_1
    new = ask(b"", method="GET", path=wire.MODEL_PATH, headers={wire.WIRE_HEADER: "2"}).json()
    assert (new["wire"], new["fields"], new["join"]) == (2, [], "chat")


def test_the_cache_tells_conversations_apart_by_turns_and_roles() -> None:
    cache, scorer = ScoreCache(100), FakeScorer()
    chats: list[Text] = [
        Chat((("user", "ab"), ("assistant", "c"))),
        Chat((("user", "a"), ("assistant", "bc"))),
        Chat((("system", "ab"), ("assistant", "c"))),
        Chat((("user", "a"), ("user", "b"), ("assistant", "c"))),
        Chat((("usera", "b"), ("assistant", "c"))),
        ("ab", "c"),
        ("userabassistantc", None),
    ]
    rows: list[tuple[float, ...]] = [(float(place),) for place in range(len(chats))]
    cache.keep(chats, Scored(rows, [], [1] * len(chats), scorer, 0.0, 0.0, 0.0))
    known = cache.lookup(scorer, chats)
    assert [score.logits for score in known if score is not None] == rows
    assert cache.lookup(scorer, [Chat((("user", "ab"), ("assistant", "d")))]) == [None]


def test_the_document_describes_messages_and_fields(ask: Callable[..., httpx.Response]) -> None:
    schemas = ask(b"", method="GET", path="/openapi.json").json()["components"]["schemas"]
    prompt = schemas["RewardItem"]["properties"]["prompt"]["anyOf"]
    assert [each["type"] for each in prompt] == ["string", "array"]
    assert prompt[1]["items"]["$ref"].endswith("/ChatMessage")
    assert schemas["RewardItem"]["properties"]["fields"]["type"] == "object"
    assert {"wire", "fields"} <= schemas["ModelInfo"]["properties"].keys()
