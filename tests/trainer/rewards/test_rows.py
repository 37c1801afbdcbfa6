"""Conversations and columns: each reward belongs to its own prompt, response and fields."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.foreign import stand_ins as foreign
from harness.stub_reward_server import StubRewardServer, stub_reward, stub_reward_of
from plaudit.rewards import RemoteReward, RewardClient, RewardRejected
from plaudit.rewards.rows import messages_of, rows_of
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.wire import MAX_VALUES_PER_REQUEST, ChatMessage

pytestmark = pytest.mark.usefixtures("quick_retries")

HERE = __name__
CHATS = [
    [{"role": "system", "content": f"Be kind, {i}."}, {"role": "user", "content": f"How was film {i}?"}]
    for i in range(40)
]
RESPONSES = [f"Film {i} was fine." for i in range(40)]
ANSWERS = [{"right": i, "tests": [f"t{i}", None, 1.5]} for i in range(40)]
COLUMNS: dict[str, list[Any]] = {"answer": ANSWERS, "unasked": [object()] * 40}
EXPECTED = [
    stub_reward_of({"prompt": chat, "response": response, "fields": {"answer": answer}})
    for chat, response, answer in zip(CHATS, RESPONSES, ANSWERS, strict=True)
]

Start = Callable[[], StubRewardServer]


def settings(*servers: StubRewardServer, **changes: Any) -> RewardSettings:
    values = {
        "label": "POSITIVE",
        "patience_s": 30.0,
        "request_timeout_s": 20.0,
        "chunk_size": 4,
        "check_order": False,
    } | changes
    return RewardSettings.of(url=tuple(server.url for server in servers), **values)


CHAT_WITH_ANSWERS = {"wire": 2, "join": "chat", "fields": ["answer"]}


def test_every_reward_is_of_its_own_prompt_response_and_fields_through_retries_hedging_and_chunks(
    start_stub: Start,
) -> None:
    first, second, third = start_stub(), start_stub(), start_stub()
    acts: list[dict[str, Any]] = [
        {"do": "reset"},
        {"do": "status", "status": 503},
        {"do": "cut"},
        {"do": "score", "delay_s": 0.3},
    ]
    for server in (first, second, third):
        server.set(info=CHAT_WITH_ANSWERS)
    first.script([act | {"times": 2} for act in acts])
    second.script([{"do": "score", "delay_s": 0.4, "times": 2}, {"do": "status", "status": 500}, {"do": "reset"}])
    with RewardClient(settings(first, second, third, hedge_after_s=0.1, max_in_flight=2)) as client:
        client.connect()
        assert client.score(CHATS, RESPONSES, COLUMNS) == EXPECTED
        third.kill()
        assert client.score(CHATS[::-1], RESPONSES[::-1], {"answer": ANSWERS[::-1]}) == EXPECTED[::-1]
    assert len(set(EXPECTED)) == 40


def test_fields_go_to_nobody_who_does_not_ask(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(info={"wire": 2, "join": "chat"})
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        expected = [stub_reward_of({"prompt": c, "response": r}) for c, r in zip(CHATS, RESPONSES, strict=True)]
        assert client.score(CHATS, RESPONSES, COLUMNS) == expected


def test_what_goes_to_an_older_service_is_what_always_went(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        assert client.score(["a"], ["b"], {"answer": [1]}) == [stub_reward("a", "b")]
        assert stub_reward_server.state["last_request"] == {
            "items": [{"prompt": "a", "response": "b"}],
            "label": "POSITIVE",
        }


@pytest.mark.parametrize(
    ("info", "said"),
    [({}, "from before conversations; update it"), ({"wire": 2, "join": "pair"}, "--join pair; start it with --join")],
)
def test_a_conversation_for_a_service_that_takes_texts_says_what_to_do(
    stub_reward_server: StubRewardServer, info: dict[str, Any], said: str
) -> None:
    stub_reward_server.set(info=info)
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match=said) as caught:
            client.score(["a text", CHATS[0]], ["b", "c"])
    assert "row 1" in str(caught.value)
    assert "--reward.render" in str(caught.value)


def test_one_text_and_conversations_go_in_one_request(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(info={"wire": 2, "join": "chat"})
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        chat = [ChatMessage(role="user", content="Hi")]
        expected = [
            stub_reward_of({"prompt": "a text", "response": "b"}),
            stub_reward_of({"prompt": [{"role": "user", "content": "Hi"}], "response": "c"}),
        ]
        assert client.score(["a text", chat], ["b", "c"]) == expected
        assert stub_reward_server.state["requests"] == 1


def test_a_row_without_a_field_that_is_asked_for_is_refused_by_name_and_row(
    stub_reward_server: StubRewardServer,
) -> None:
    stub_reward_server.set(info=CHAT_WITH_ANSWERS)
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match="'answer', and row 1 has no value") as caught:
            client.score(CHATS[:2], RESPONSES[:2], {"answer": [1, None], "other": [1, 2]})
        assert "answer, other" in str(caught.value)
        assert caught.value.exit_code == 65
        with pytest.raises(RewardRejected, match=r"'answer', and row 0 has no value for it \(it has no columns\)"):
            client.score(CHATS[:2], RESPONSES[:2])


def test_a_service_that_asks_for_a_column_which_the_data_lacks_is_refused_when_connecting(
    stub_reward_server: StubRewardServer,
) -> None:
    stub_reward_server.set(info=CHAT_WITH_ANSWERS)
    with (
        RewardClient(settings(stub_reward_server), fields=["label", "id"]) as client,
        pytest.raises(RewardRejected, match="'answer', and the data has the columns id, label"),
    ):
        client.connect()


@pytest.mark.parametrize("value", [float("nan"), {1}, "\ud800", {"a": {2: "b"}}])
def test_a_field_that_is_no_json_is_refused_by_name_and_row(stub_reward_server: StubRewardServer, value: Any) -> None:
    stub_reward_server.set(info=CHAT_WITH_ANSWERS)
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match=r"fields of row 0 can't be sent .*'answer'"):
            client.score(CHATS[:1], RESPONSES[:1], {"answer": [value]})


def test_a_column_of_another_length_is_refused_at_once(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(ValueError, match="'answer' has 1 values for 2 responses"):
            client.submit(["a", "b"], ["c", "d"], {"answer": [1]})


def test_long_conversations_are_spread_over_requests_that_a_service_takes(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(info={"wire": 2, "join": "chat"})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 500
    with RewardClient(settings(stub_reward_server, chunk_size=32)) as client:
        client.connect()
        expected = stub_reward_of({"prompt": turns, "response": "c"})
        assert client.score([turns] * 10, ["c"] * 10) == [expected] * 10
    assert stub_reward_server.state["requests"] == 4  # 5,000 values each, of which a request holds 18,432
    assert 3 * 5007 < MAX_VALUES_PER_REQUEST < 4 * 5007


def by_answer(prompts: list[Any], responses: list[str], answer: list[dict[str, Any]]) -> list[float]:
    assert all(isinstance(prompt, list) and isinstance(prompt[0], dict) for prompt in prompts)
    return [
        stub_reward_of({"prompt": p, "response": r, "fields": {"answer": a}})
        for p, r, a in zip(prompts, responses, answer, strict=True)
    ]


async def by_anything(prompts: list[Any], responses: list[str], **columns: list[Any]) -> list[float]:
    return [float(len(columns) * 1000 + place) for place in columns.get("place", [0] * len(prompts))]


def by_answer_or_none(prompts: list[Any], responses: list[str], answer: list[Any] | None = None) -> list[float]:
    return [0.0 if answer is None or value is None else float(value) for value in answer or [None] * len(prompts)]


def test_a_function_gets_the_columns_that_its_parameters_name() -> None:
    with RewardClient(RewardSettings.of(function=f"{HERE}:by_answer", chunk_size=4), fields=COLUMNS) as client:
        client.connect()
        assert client.score(CHATS, RESPONSES, COLUMNS) == EXPECTED


def test_a_function_that_takes_any_column_gets_all_of_them() -> None:
    with RewardClient(RewardSettings.of(function=f"{HERE}:by_anything", chunk_size=4)) as client:
        client.connect()
        columns: dict[str, list[Any]] = {"place": list(range(10)), "other": [None] * 10}
        assert client.score(["a"] * 10, ["b"] * 10, columns) == [2000.0 + place for place in range(10)]
        assert client.score(["a"] * 2, ["b"] * 2) == [0.0, 0.0]


def test_a_parameter_with_a_default_may_have_no_column_and_no_value() -> None:
    with RewardClient(RewardSettings.of(function=f"{HERE}:by_answer_or_none"), fields=()) as client:
        client.connect()
        assert client.score(["a"] * 2, ["b"] * 2) == [0.0, 0.0]
        assert client.score(["a"] * 2, ["b"] * 2, {"answer": [None, 3]}) == [0.0, 3.0]


def test_a_function_that_needs_a_column_which_the_data_lacks_is_refused_when_connecting() -> None:
    with (
        RewardClient(RewardSettings.of(function=f"{HERE}:by_answer"), fields=["question"]) as client,
        pytest.raises(RewardRejected, match="by_answer asks for the field 'answer', and the data has the columns"),
    ):
        client.connect()


def test_a_row_that_lacks_what_a_function_needs_is_named() -> None:
    with RewardClient(RewardSettings.of(function=f"{HERE}:by_answer", chunk_size=2)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match="by_answer asks for the field 'answer', and row 3 has no value"):
            client.score(CHATS[:4], RESPONSES[:4], {"answer": [*ANSWERS[:3], None]})


def test_openrlhf_gets_the_label_of_each_row_from_the_column_that_is_named() -> None:
    seen: list[Any] = []

    def server(method: str, path: str, body: Any) -> tuple[int, Any]:
        seen.append(body["labels"])
        return foreign.openrlhf(method, path, body)

    with foreign.serving(server) as url:
        asked = RewardSettings.of(url=(url,), kind="openrlhf", label_field="answer", check_order=False)
        with RewardClient(asked) as client:
            client.connect()
            client.score(["a", "b"], ["c", "d"], {"answer": ["x", {"y": 1}], "label": [1, 2]})
            client.score(["a", "b"], ["c", "d"])
    assert seen == [["x", {"y": 1}], ["", ""]]


@pytest.mark.parametrize("kind", ["vllm-classify", "vllm-pooling"])
def test_vllm_gets_messages_one_conversation_a_request(kind: str) -> None:
    seen: list[Any] = []

    def server(method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "POST" and "messages" in body:
            seen.append(body["messages"])
            assert body["add_generation_prompt"] is False
            body = body | {"input": [repr(body["messages"])]}
        return foreign.vllm(method, path, body)

    with foreign.serving(server) as url:
        asked = RewardSettings.of(url=(url,), kind=kind, label_index=1, patience_s=30.0)
        with RewardClient(asked) as client:
            client.connect()
            got = client.score(CHATS[:3], RESPONSES[:3])
    sent = [[*c, {"role": "assistant", "content": r}] for c, r in zip(CHATS[:3], RESPONSES[:3], strict=True)]
    assert sorted(seen, key=repr) == sorted(sent, key=repr)
    assert got == [foreign.logits(repr(messages))[1] for messages in sent]


@pytest.mark.parametrize("kind", ["tei", "infinity", "sglang", "openrlhf"])
def test_protocols_of_texts_alone_get_what_the_template_writes(tmp_path: Path, kind: str) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    server, needed = foreign.SPOKEN[kind]
    with foreign.serving(server) as url:
        with RewardClient(RewardSettings.of(url=(url,), kind=kind, **needed)) as client:
            client.connect()
            with pytest.raises(RewardRejected, match="no place for messages"):
                client.score(CHATS[:1], RESPONSES[:1])
        asked = RewardSettings.of(url=(url,), kind=kind, render=str(template), **needed)
        with RewardClient(asked) as client:
            client.connect()
            got = client.score(CHATS[:3], RESPONSES[:3])
    texts = [f"<system>Be kind, {i}.</><user>How was film {i}?</><assistant>Film {i} was fine.</>" for i in range(3)]
    assert got == [foreign.logits(text)[1] for text in texts]


def test_messages_that_are_more_than_text_are_refused() -> None:
    kept = [{"role": "user", "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "good"}]}]
    assert messages_of([{**kept[0], "tool_calls": None}]) == [ChatMessage(role="user", content="so good")]
    for message in (
        {"role": "tool", "content": "a", "tool_call_id": "x"},
        {"role": "user", "content": [{"type": "image", "image": "film.png"}]},
        {"content": "a"},
        {"role": "assistant", "content": None},
    ):
        with pytest.raises(RewardRejected):
            messages_of([message])
    with pytest.raises(RewardRejected, match="row 1 has a text that can't be sent"):
        rows_of(["a", [{"role": "user", "content": "\ud800"}]], ["b", "c"], {})


def test_trls_conversations_and_columns_go_on_as_they_are(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(info=CHAT_WITH_ANSWERS)
    reward = RemoteReward(settings(stub_reward_server))
    tools = [{"role": "assistant", "content": "Let me see."}, {"role": "user", "content": "Go on."}]
    try:
        scores = asyncio.run(
            reward(
                prompts=CHATS[:2],
                completions=[
                    [{"role": "assistant", "content": "Fine."}],
                    [*tools, {"role": "assistant", "content": "Good."}],
                ],
                answer=["x", "y"],
                trainer_state=object(),
                completion_ids=[[1], [2]],
            )
        )
    finally:
        reward.close()
    assert scores == [
        stub_reward_of({"prompt": CHATS[0], "response": "Fine.", "fields": {"answer": "x"}}),
        stub_reward_of({"prompt": [*CHATS[1], *tools], "response": "Good.", "fields": {"answer": "y"}}),
    ]


def test_several_rewards_each_get_what_they_ask_for(start_stub: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    asks, does_not = start_stub(), start_stub()
    asks.set(info=CHAT_WITH_ANSWERS)
    does_not.set(info={"wire": 2, "join": "chat"})
    mixed = RewardSettings(
        (
            RewardComponent(name="asks", url=(asks.url,)),
            RewardComponent(name="plain", url=(does_not.url,)),
            RewardComponent(name="function", function=f"{HERE}:by_answer"),
        ),
        patience_s=30.0,
    )
    with RewardClient(mixed, fields=["answer"]) as client:
        client.connect()
        components = client.submit_components(CHATS, RESPONSES, COLUMNS).result(timeout=60).components
    assert components["asks"] == components["function"] == EXPECTED
    assert components["plain"] == [
        stub_reward_of({"prompt": c, "response": r}) for c, r in zip(CHATS, RESPONSES, strict=True)
    ]
