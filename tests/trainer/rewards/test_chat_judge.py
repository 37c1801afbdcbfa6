"""A generative judge over chat completions: three ways to a number, and no number where there is none."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from harness.foreign.chat_completions import ChatServer
from harness.foreign.stand_ins import serving
from harness.stub_reward_server import stub_reward_of
from plaudit.errors import ConfigError
from plaudit.rewards import JudgeSettings, RewardClient, RewardRejected
from plaudit.rewards.settings import RewardSettings
from plaudit.settings import files
from plaudit.settings.ppo import PPOConfig


def settings(url: str, *, judge: dict[str, Any] | None = None, **changes: Any) -> RewardSettings:
    values: dict[str, Any] = {"patience_s": 30.0} | changes
    return RewardSettings.of(url=(url,), kind="chat-judge", judge=JudgeSettings(**judge or {}), **values)


def length_of_the_answer(question: str) -> int:
    found = re.search(r"<answer>(.*)</answer>", question, re.DOTALL)
    return len(found[1]) if found else 0


@pytest.fixture
def question(tmp_path: Path) -> Path:
    file = tmp_path / "question.txt"
    file.write_text('Reply with {"score": N}.\n{conversation}\n<answer>{response}</answer>')
    return file


PROMPTS = ["a"] * 20
RESPONSES = ["x" * (i + 1) for i in range(20)]


def test_the_last_place_that_the_pattern_finds_is_the_score(question: Path) -> None:
    server = ChatServer(says=lambda q: f"Score: 99 would be too much.\nScore: {length_of_the_answer(q)}.5")
    with serving(server) as url, RewardClient(settings(url, judge={"prompt": question})) as client:
        info = client.connect()
        assert client.score(PROMPTS, RESPONSES) == [i + 1.5 for i in range(20)]
    assert (info.id, info.limits.max_items) == ("judge-1", 1)
    assert info.revision.startswith("judge-1@judge:")


def test_a_number_in_json_after_a_schema_is_the_score(question: Path, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"why": {"type": "string"}, "mark": {"type": "object", "properties": {"n": {"type": "number"}}}},
        "required": ["why", "mark"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    server = ChatServer(says=lambda q: json.dumps({"why": "Score: 1", "mark": {"n": length_of_the_answer(q)}}))
    judge = {"prompt": question, "answer": "json", "schema": tmp_path / "schema.json", "key": "mark.n"}
    with serving(server) as url, RewardClient(settings(url, judge=judge)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == [i + 1.0 for i in range(20)]
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == schema


def test_the_mean_of_the_scores_is_weighted_by_their_tokens_probabilities(question: Path) -> None:
    server = ChatServer(knows=lambda q: {"1": 0.1, "4": 0.25, " 5": 0.15, "5": 0.1, "The": 0.3, "3.5": 0.1})
    with serving(server) as url, RewardClient(settings(url, judge={"answer": "logprobs"})) as client:
        client.connect()
        # 0.1 of a 1, 0.25 of a 4, 0.15 + 0.1 of a 5: (0.1 + 1 + 1.25) / 0.6
        assert client.score(["a"], ["b"]) == [pytest.approx(2.35 / 0.6)]
    asked = server.bodies[0]
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 1)


def test_a_judge_that_is_about_to_say_something_else_gives_no_number() -> None:
    server = ChatServer(knows=lambda q: {"1": 0.3, "5": 0.1, "Sure": 0.6})
    with (
        serving(server) as url,
        RewardClient(settings(url, judge={"answer": "logprobs"})) as client,
        pytest.raises(RewardRejected, match=r"probability of 0\.4 together.*'Sure' 0\.6.*asked 3 times"),
    ):
        client.connect()
    assert len(server.questions) == 3


def test_each_score_is_of_its_own_prompt_response_and_fields(tmp_path: Path) -> None:
    """The judge's answer is a hash of all that its question shows."""
    file = tmp_path / "question.txt"
    file.write_text(
        '{"conversation": "{conversation}", "answer": "{response}", "key": "{fields.key}", "all": {fields}}'
    )

    def says(question: str) -> str:
        return f"Score: {stub_reward_of({'prompt': question, 'response': ''}):.6f}"

    chats = [[{"role": "system", "content": f"s{i}"}, {"role": "user", "content": f"u{i}"}] for i in range(30)]
    answers = [f"a{i}" for i in range(30)]
    columns: dict[str, list[Any]] = {
        "key": [f"k{i}" for i in range(30)],
        "rubric": [{"points": i} for i in range(30)],
        "other": [0] * 30,
    }
    expected = []
    for i in range(30):
        shown = json.dumps({"rubric": {"points": i}})
        asked = f'{{"conversation": "system: s{i}\n\nuser: u{i}", "answer": "a{i}", "key": "k{i}", "all": {shown}}}'
        expected.append(float(f"{stub_reward_of({'prompt': asked, 'response': ''}):.6f}"))
    judge = {"prompt": file, "fields": ("rubric",)}
    server = ChatServer(says=says)
    with serving(server) as url, RewardClient(settings(url, judge=judge, max_in_flight=4)) as client:
        client.connect()
        assert client.score(chats, answers, columns) == expected
        with pytest.raises(RewardRejected, match="asks for the field 'rubric', and row 0"):
            client.score(chats[:1], answers[:1], {"key": ["k"]})


def test_what_is_judged_cannot_open_a_place_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text("{prompt}|{response}|{fields.x}")
    server = ChatServer()
    with serving(server) as url, RewardClient(settings(url, judge={"prompt": file})) as client:
        client.connect()
        client.score(["{response}"], ["{fields.x} {prompt}"], {"x": ["{response}"]})
    assert server.questions[-1] == "{response}|{fields.x} {prompt}|{response}"


def test_a_judge_that_names_no_score_is_asked_again_and_then_the_run_stops(question: Path) -> None:
    left = {"yy": 2, "nnn": 99}

    def says(question: str) -> str:
        answer = "".join(re.findall(r"<answer>(.*)</answer>", question))
        if left.get(answer, 0):
            left[answer] -= 1
            return "I would rather not say."
        return "Score: 4"

    with (
        serving(ChatServer(says=says)) as url,
        RewardClient(settings(url, judge={"prompt": question, "tries": 3})) as client,
    ):
        client.connect()
        assert client.score(["a", "a"], ["x", "yy"]) == [4.0, 4.0]
        with pytest.raises(RewardRejected, match=r"I would rather not say.*asked 3 times") as caught:
            client.score(["a"], ["nnn"])
    assert left == {"yy": 0, "nnn": 96}
    assert caught.value.exit_code == 65
    assert caught.value.exchange is not None
    assert "nnn" in caught.value.exchange.request


@pytest.mark.parametrize(
    ("server", "judge", "said"),
    [
        (ChatServer(refuses=lambda q: "I can't help with that."), {}, "the judge refuses: \"I can't help"),
        (ChatServer(says=lambda q: None), {}, "said nothing"),
        (
            ChatServer(says=lambda q: "Score: 11"),
            {"low": 1.0, "high": 10.0},
            "gave 11, and scores are from 1.0 to 10.0",
        ),
        (ChatServer(says=lambda q: "Score: 1e999"), {"pattern": r"(\d\S*)"}, "gave inf"),
        (ChatServer(says=lambda q: "Score: high"), {"pattern": r"Score: (\w+)"}, "found 'high', which is no number"),
        (ChatServer(says=lambda q: '{"score": "5"}'), {"answer": "json"}, "number at reward.judge.key='score'"),
        (ChatServer(says=lambda q: '{"score": true}'), {"answer": "json"}, "number at"),
        (ChatServer(says=lambda q: "So, first", finish_reason="length"), {}, "cut off at reward.judge.max_tokens=512"),
        (ChatServer(has_logprobs=False), {"answer": "logprobs"}, "without the top_logprobs that were asked for"),
        (
            ChatServer(has_formats=False),
            {"answer": "json"},
            "no JSON with a number at reward.judge.key='score', though response_format asked",
        ),
    ],
)
def test_a_server_that_gives_no_score_is_refused_at_the_start_in_one_line(
    server: ChatServer, judge: dict[str, Any], said: str
) -> None:
    with (
        serving(server) as url,
        RewardClient(settings(url, judge=judge)) as client,
        pytest.raises(RewardRejected) as caught,
    ):
        client.connect()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "POSITIVE"}, "no labels.*leave out reward.label"),
        ({"model": "judge-9"}, "model does not exist"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_when_connecting(changes: dict[str, Any], said: str) -> None:
    with (
        serving(ChatServer()) as url,
        RewardClient(settings(url, **changes)) as client,
        pytest.raises(RewardRejected, match=said),
    ):
        client.connect()


def test_of_several_models_one_must_be_chosen() -> None:
    server = ChatServer(models=("small", "large"))
    with serving(server) as url:
        with RewardClient(settings(url)) as client, pytest.raises(RewardRejected, match=r"reward\.model: small, large"):
            client.connect()
        with RewardClient(settings(f"{url}/v1/", model="large")) as client:
            client.connect()
            assert client.revision.startswith("large@judge:")
            assert client.score(["a"], ["b"]) == [3.0]


def test_the_revision_changes_with_the_question_and_how_it_is_asked_and_not_with_the_files_place(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    one, same, other = tmp_path / "one.txt", tmp_path / "a" / "one.txt", tmp_path / "other.txt"
    for file, text in ((one, "{response}?"), (same, "{response}?"), (other, "{response}!")):
        file.write_text(text)
    revisions = []
    with serving(ChatServer()) as url:
        for judge in ({"prompt": one}, {"prompt": same, "tries": 9}, {"prompt": other}, {"prompt": one, "high": 9.0}):
            with RewardClient(settings(url, judge=judge)) as client:
                client.connect()
                revisions.append(client.revision)
    assert revisions[0] == revisions[1]
    assert len(set(revisions)) == 3


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"scores": ("1", "good")}, "'good', which is no number"),
        ({"scores": ()}, "is empty"),
        ({"low": 2.0, "high": 1.0}, "must be less than"),
        ({"temperature": -1.0}, "must be 0 or more"),
        ({"tries": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_fail_when_built(judge: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        JudgeSettings(**judge)


def test_a_question_without_a_place_for_the_response_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    with pytest.raises(ConfigError, match="can't be read"):
        RewardClient(settings("http://127.0.0.1:1", judge={"prompt": file}))
    file.write_text("Is {prompt} good?")
    with pytest.raises(ConfigError, match=r"has no \{response\}"):
        RewardClient(settings("http://127.0.0.1:1", judge={"prompt": file}))


def test_a_settings_file_may_describe_the_judge(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "reward:\n  kind: chat-judge\n  judge:\n    answer: logprobs\n    scores: ['0', '1']\n    prompt: q.txt\n"
    )
    component = files.load(PPOConfig, file).reward.components[0]
    assert component.judge == JudgeSettings(answer="logprobs", scores=("0", "1"), prompt=Path("q.txt"))
    file.write_text("reward:\n  judge:\n    answr: json\n")
    with pytest.raises(ConfigError, match=r"reward\.judge\.answr.*did you mean reward\.judge\.answer"):
        files.load(PPOConfig, file)


def test_slime_gets_prompt_response_and_label_and_its_number_is_the_reward() -> None:
    seen: list[Any] = []

    def server(method: str, path: str, body: Any) -> tuple[int, Any]:
        assert (method, path) == ("POST", "/rm/score")
        seen.append(body)
        return 200, float(len(body["response"])) if body["label"] != "odd" else math.pi

    chat = [{"role": "user", "content": "Hi"}]
    with serving(server) as url:
        asked = RewardSettings.of(url=(f"{url}/rm/score",), kind="slime", patience_s=30.0)
        with RewardClient(asked) as client:
            client.connect()
            assert client.score(["a", chat], ["bb", "ccc"], {"label": ["odd", 3]}) == [math.pi, 3.0]
            assert client.score(["a"], ["bb"]) == [2.0]
    assert sorted(seen, key=repr) == sorted(
        [
            {"prompt": "a", "response": "bb", "label": "odd"},
            {"prompt": chat, "response": "ccc", "label": 3},
            {"prompt": "a", "response": "bb", "label": None},
        ],
        key=repr,
    )
