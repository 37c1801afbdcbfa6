import json
import math
import time
from concurrent.futures import CancelledError
from email.utils import formatdate
from pathlib import Path

import pytest

from harness.stub_reward_server import LABELS, REVISION, StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardRejected, RewardUnavailable
from plaudit.rewards.settings import RewardSettings

pytestmark = pytest.mark.usefixtures("quick_retries")

PROMPTS = [f"prompt {i}" for i in range(50)]
RESPONSES = [f" response {i}" for i in range(50)]
EXPECTED = [stub_reward(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


NO_SUCH_LABEL = json.dumps(
    {
        "type": "urn:plaudit:problem:unknown-label",
        "title": "Unknown label",
        "status": 422,
        "detail": "no label 'POSITIVE'",
        "labels": ["GOOD", "BAD"],
    }
)
"""What the service answers after another model has taken its place."""


def problem(name: str) -> str:
    """A problem document of the service."""
    title = name.replace("-", " ").capitalize()
    return json.dumps({"type": f"urn:plaudit:problem:{name}", "title": title, "status": 500, "detail": f"{name}!"})


def settings(*servers: StubRewardServer, **changes: object) -> RewardSettings:
    values = {
        "label": "POSITIVE",
        "patience_s": 30.0,
        "request_timeout_s": 20.0,
        "chunk_size": 8,
        "check_order": False,
    } | changes
    return RewardSettings.of(url=tuple(server.url for server in servers), **values)


def test_rewards_come_back_in_the_order_of_the_texts(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        info = client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert client.revision == info.revision == REVISION
    state = stub_reward_server.state
    assert state["largest_request"] == 8
    assert state["requests"] == 7
    assert set(state["scored"].values()) == {1}


def test_without_a_label_the_service_chooses_and_its_choice_belongs_to_the_revision(
    stub_reward_server: StubRewardServer,
) -> None:
    with RewardClient(settings(stub_reward_server, label=None)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert client.revision == f"{REVISION} (label POSITIVE)"
        assert "label" not in stub_reward_server.state["last_request"]
        stub_reward_server.script([{"do": "label", "label": "NEGATIVE"}])
        with pytest.raises(RewardRejected, match=r"\(label NEGATIVE\), and so far it was .*\(label POSITIVE\)"):
            client.score(PROMPTS, RESPONSES)


def test_without_a_label_the_only_one_is_taken_and_several_are_refused(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(info={"labels": ["POSITIVE"]})
    with RewardClient(settings(stub_reward_server, label=None)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert client.revision == REVISION
    stub_reward_server.set(info={"default_label": None})
    refused = pytest.raises(RewardRejected, match=r"several labels: .*--reward\.label: NEGATIVE, POSITIVE")
    with RewardClient(settings(stub_reward_server, label=None)) as client, refused:
        client.connect()


def test_nothing_to_score_asks_nobody(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        assert client.score([], []) == []
    assert stub_reward_server.state["requests"] == 0


def test_submitting_does_not_wait_for_the_answer(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "score", "delay_s": 1.0}])
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        futures = [client.submit(PROMPTS[i : i + 5], RESPONSES[i : i + 5]) for i in range(0, 50, 5)]
        assert not futures[0].done()
        assert [reward for future in futures for reward in future.result(timeout=60)] == EXPECTED


def say(act: object) -> str:
    return (
        "-".join(str(value) for value in act.values() if isinstance(value, str | int)) if isinstance(act, dict) else ""
    )


@pytest.mark.parametrize(
    "act",
    [
        *({"do": "status", "status": status} for status in (408, 425, 429, 500, 502, 503, 504)),
        {"do": "status", "status": 502, "headers": {"Content-Type": "text/html"}, "body": "<h1>Bad Gateway</h1>"},
        {"do": "status", "status": 503, "body": problem("out-of-memory")},
        {"do": "reset"},
        {"do": "cut"},
        {"do": "truncated_gzip"},
        {"do": "literal", "text": "[1, 2"},
    ],
    ids=say,
)
def test_a_passing_trouble_is_retried_and_no_reward_is_lost_or_invented(
    stub_reward_server: StubRewardServer, act: dict[str, object]
) -> None:
    stub_reward_server.script([{**act, "times": 3}])
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert stub_reward_server.state["requests"] == 10


@pytest.mark.parametrize("act", [{"do": "hang"}, {"do": "hang", "after": 20}, {"do": "drip", "delay_s": 0.05}], ids=say)
def test_a_server_that_hangs_at_any_point_is_asked_again_after_the_timeout(
    stub_reward_server: StubRewardServer, act: dict[str, object]
) -> None:
    stub_reward_server.script([{**act, "times": 3}])
    with RewardClient(settings(stub_reward_server, request_timeout_s=1.0, patience_s=60.0)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert stub_reward_server.state["requests"] >= 10


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ({"do": "status", "status": 400, "body": "no such thing"}, "400 Bad Request: no such thing"),
        ({"do": "status", "status": 401}, "refuses the credentials"),
        ({"do": "status", "status": 404}, "404 Not Found"),
        ({"do": "status", "status": 413}, "413"),
        ({"do": "status", "status": 422}, "422"),
        *(
            ({"do": "status", "status": 500, "body": problem(name)}, f"can't score this, now or later: 500.*: {name}!")
            for name in ("scoring-failed", "non-finite-score", "internal-error")
        ),
        ({"do": "wrong_count"}, "8 items were sent and 7 rewards came back"),
        ({"do": "literal", "text": "NaN"}, "finite"),
        ({"do": "literal", "text": "Infinity"}, "finite"),
        ({"do": "literal", "text": "-Infinity"}, "finite"),
        ({"do": "literal", "text": "1e999"}, "finite"),
        ({"do": "literal", "text": "null"}, "valid number"),
        ({"do": "literal", "text": "true"}, "valid number"),
        ({"do": "literal", "text": '"0.5"'}, "valid number"),
        ({"do": "label", "label": "NEGATIVE"}, "'POSITIVE' was asked for and 'NEGATIVE' came back"),
        ({"do": "revision", "revision": "sha256:other"}, "sha256:other.*sha256:stub"),
        ({"do": "html"}, "text/html.*Sign in"),
        ({"do": "status", "status": 422, "body": NO_SUCH_LABEL}, r"no label 'POSITIVE' \(labels: GOOD, BAD\)"),
        ({"do": "redirect", "location": "https://elsewhere/v1/rewards"}, "redirects to https://elsewhere/v1/rewards"),
    ],
    ids=say,
)
def test_a_refusal_stops_at_once_and_tells_what_came_back(
    stub_reward_server: StubRewardServer, act: dict[str, object], message: str
) -> None:
    stub_reward_server.script([act])
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match=message):
            client.score(PROMPTS[:8], RESPONSES[:8])
    assert stub_reward_server.state["requests"] == 1


def test_a_rejection_can_be_saved_with_the_request_and_the_answer(
    stub_reward_server: StubRewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_REWARD_API_KEY", "secret")
    stub_reward_server.script([{"do": "status", "status": 422, "body": "too strange"}])
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected) as caught:
            client.score(["a prompt"], [" a response"])
    text = caught.value.save(tmp_path / "run").read_text()
    record = json.loads(text)
    assert json.loads(record["exchange"]["request"])["items"] == [{"prompt": "a prompt", "response": " a response"}]
    assert (record["exchange"]["status"], record["exchange"]["answer"]) == (422, "too strange")
    assert "secret" not in text
    assert stub_reward_server.state["headers"]["authorization"] == "Bearer secret"


def test_the_api_key_file_goes_before_the_environment(
    stub_reward_server: StubRewardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_REWARD_API_KEY", "from the environment")
    (tmp_path / "key").write_text("from-the-file\n")
    with RewardClient(settings(stub_reward_server, api_key_file=tmp_path / "key")) as client:
        client.connect()
    assert stub_reward_server.state["headers"]["authorization"] == "Bearer from-the-file"
    with pytest.raises(ConfigError, match="missing"):
        RewardClient(settings(stub_reward_server, api_key_file=tmp_path / "missing"))


@pytest.mark.parametrize("form", ["seconds", "a date", "a date that has passed"])
def test_retry_after_is_honoured_in_both_of_its_forms(stub_reward_server: StubRewardServer, form: str) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        until = {"seconds": time.time() + 1.5, "a date": math.ceil(time.time()) + 1, "a date that has passed": 0}[form]
        header = "1.5" if form == "seconds" else formatdate(until, usegmt=True)
        stub_reward_server.script([{"do": "status", "status": 429, "headers": {"Retry-After": header}}])
        client.score(["a"], ["b"])
    assert time.time() >= until


def test_a_change_of_revision_goes_on_when_it_is_meant(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "revision", "revision": "sha256:other", "times": 9}])
    with RewardClient(settings(stub_reward_server, allow_revision_change=True)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert client.revision == "sha256:other"


def test_a_request_that_alone_breaks_the_server_is_rejected(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "status", "status": 500, "when": "poison", "times": 1000}])
    with RewardClient(settings(stub_reward_server, patience_s=60.0)) as client:
        client.connect()
        poison = client.submit(["poison"], ["pill"])
        while not poison.done():
            assert client.score(["a"], ["b"]) == [stub_reward("a", "b")]
        with pytest.raises(RewardRejected, match=r"\d+ times the server failed on this request"):
            poison.result()


def test_a_server_that_fails_on_everything_is_unavailable_and_no_request_is_blamed(
    stub_reward_server: StubRewardServer,
) -> None:
    stub_reward_server.script([{"do": "status", "status": 500, "times": 10_000}])
    with RewardClient(settings(stub_reward_server, patience_s=0.5)) as client:
        client.connect()
        with pytest.raises(RewardUnavailable, match="500"):
            client.score(PROMPTS, RESPONSES)


def test_a_missing_label_names_those_there_are(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server, label="GOOD")) as client, pytest.raises(RewardRejected) as caught:
        client.connect()
    assert all(label in str(caught.value) for label in ["GOOD", *LABELS])


def test_connect_waits_until_the_service_is_ready_and_says_what_for(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.set(ready=False)
    said: list[str] = []

    def on_wait(message: str) -> None:
        said.append(message)
        if len(said) == 3:
            stub_reward_server.set(ready=True)

    with RewardClient(settings(stub_reward_server), on_wait=on_wait) as client:
        client.connect()
    assert len(said) == 4
    assert "503" in said[0]
    assert said[-1] == ""


def test_a_url_of_nothing_gives_one_line_with_the_url_and_what_to_do(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.kill()
    with (
        RewardClient(settings(stub_reward_server, patience_s=0.2)) as client,
        pytest.raises(RewardUnavailable) as caught,
    ):
        client.connect()
    message = str(caught.value)
    assert stub_reward_server.url in message
    assert "--reward.url" in message
    assert "\n" not in message


def test_no_url_at_all_is_refused_when_built() -> None:
    with pytest.raises(ConfigError, match=r"reward\.url is empty"):
        RewardClient(RewardSettings())


def test_a_server_that_only_fails_ends_in_unavailable_within_the_patience(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "status", "status": 503, "times": 10_000}])
    with RewardClient(settings(stub_reward_server, patience_s=0.5)) as client:
        client.connect()
        started = time.monotonic()
        with pytest.raises(RewardUnavailable, match="503"):
            client.score(PROMPTS, RESPONSES)
        assert 0.5 <= time.monotonic() - started < 60
        assert stub_reward_server.state["scored"] == {}


def test_cancelling_takes_the_requests_back_and_the_client_goes_on(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "hang", "times": 7}])
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        future = client.submit(PROMPTS, RESPONSES)
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(timeout=1)
        stub_reward_server.script([])
        assert client.score(PROMPTS, RESPONSES) == EXPECTED


def test_closing_while_the_server_hangs_takes_no_time_and_fails_what_is_under_way(
    stub_reward_server: StubRewardServer,
) -> None:
    stub_reward_server.script([{"do": "hang", "times": 100}])
    client = RewardClient(settings(stub_reward_server, request_timeout_s=60.0))
    client.connect()
    future = client.submit(PROMPTS, RESPONSES)
    started = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - started < 60, "it waited for the server"
    with pytest.raises(CancelledError):
        future.result(timeout=1)
    with pytest.raises(RuntimeError, match="closed"):
        client.submit(["a"], ["b"])


def test_no_more_requests_are_under_way_than_the_setting_allows(stub_reward_server: StubRewardServer) -> None:
    stub_reward_server.script([{"do": "score", "delay_s": 0.3, "times": 100}])
    with RewardClient(settings(stub_reward_server, max_in_flight=3)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert stub_reward_server.state["max_in_flight"] == 3


def test_prompts_and_responses_must_be_as_many(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(ValueError, match="2 prompts and 1 responses"):
            client.submit(["a", "b"], ["c"])


def test_a_text_that_is_no_unicode_is_rejected_before_it_is_sent(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match="can't be sent"):
            client.score(["a"], ["\ud800"])
