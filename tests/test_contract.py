"""The real client against the real service, over real HTTP."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.rewards.settings import EndpointKind, RewardSettings

PROMPTS = [f"the movie {'was ' * (i % 7)}" for i in range(100)]
RESPONSES = [f"{word} and the plot number {i}" for i, word in enumerate(["good", "bad", "great", "awful"] * 25)]
KEY = "a secret of the test"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(model_dir: Path) -> Iterator[RewardService]:
    limits = ["--max-items", "16", "--max-text-chars", "500"]
    running = RewardService(model_dir, *limits, "--label", "POSITIVE", "--deterministic", api_key=KEY)
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT_REWARD_API_KEY", KEY)


def settings(service: RewardService, **changes: Any) -> RewardSettings:
    return RewardSettings.of(url=(service.url,), patience_s=60.0, **{"label": "POSITIVE"} | changes)


def test_the_client_gets_the_logits_that_transformers_computes(service: RewardService, model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    with torch.no_grad():
        expected = [
            model(**tokenizer(p + r, return_tensors="pt", truncation=True)).logits[0].tolist()
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    for index, label in enumerate(["NEGATIVE", "POSITIVE"]):
        with RewardClient(settings(service, label=label)) as client:
            info = client.connect()
            assert client.score(PROMPTS, RESPONSES) == pytest.approx([row[index] for row in expected], abs=1e-4)
            assert client.revision == info.revision


@pytest.mark.parametrize(
    ("kind", "path", "changes"),
    [
        ("tei", "", {"label": "POSITIVE"}),
        ("openrlhf", "", {}),
        ("vllm-classify", "", {"label_index": 1}),
        ("vllm-pooling", "", {"label_index": 1}),
        ("sglang", "", {"label_index": 1}),
        ("infinity", "", {"label": "POSITIVE"}),
        ("infinity", "/infinity", {"label": "POSITIVE"}),
        ("hf-inference", "", {"label": "POSITIVE"}),
        ("kserve", "", {"model": "reward", "label_index": 1}),
    ],
)
def test_in_every_protocol_that_client_and_service_both_speak_the_rewards_are_the_same(
    service: RewardService, kind: EndpointKind, path: str, changes: dict[str, Any]
) -> None:
    with RewardClient(settings(service)) as client:
        client.connect()
        expected = client.score(PROMPTS, RESPONSES)
    assert len(set(expected)) > 30
    foreign = RewardSettings.of(url=(service.url + path,), kind=kind, chunk_size=16, patience_s=60.0, **changes)
    with RewardClient(foreign) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == expected


def test_conversations_get_the_logits_of_their_judges_own_chat_template(tmp_path: Path) -> None:
    directory = tiny_classifier_dir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = (
        "[CLS]{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.role }} . {{ m.content }} [SEP]{% endfor %}"
    )
    tokenizer.save_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    chats = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": f"film {i} ?"}] for i in range(20)]
    responses = [f"number {i} was good" for i in range(20)]
    asked = [[*chat, {"role": "assistant", "content": said}] for chat, said in zip(chats, responses, strict=True)]
    with torch.no_grad():
        ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in asked]
        expected = [model(torch.tensor([each])).logits[0, 1].item() for each in ids]
    service = RewardService(directory, "--join", "chat", "--cache-items", "100", api_key=KEY)
    try:
        with RewardClient(settings(service, chunk_size=7)) as client:
            assert client.connect().join == "chat"
            for _ in range(2):  # the second time, the cache answers
                assert client.score(chats, responses, {"unasked": [1] * 20}) == pytest.approx(expected, abs=1e-4)
            by_text = client.score(["film 0 ?"], responses[:1])
            assert by_text == client.score([[{"role": "user", "content": "film 0 ?"}]], responses[:1])
            with pytest.raises(RewardRejected, match=r"items\[1\]: the chat template refuses .* no tools here"):
                client.score([chats[0], [{"role": "tool", "content": "42"}]], responses[:2])
    finally:
        service.kill()


def test_chunks_keep_to_the_services_limit(service: RewardService) -> None:
    with RewardClient(settings(service, chunk_size=1000)) as client:
        assert client.connect().limits.max_items == 16
        assert len(client.score(PROMPTS, RESPONSES)) == 100


def test_an_unknown_label_is_answered_with_those_there_are(service: RewardService) -> None:
    with RewardClient(settings(service, label="GOOD")) as client, pytest.raises(RewardRejected) as caught:
        client.connect()
    assert all(word in str(caught.value) for word in ("GOOD", "NEGATIVE", "POSITIVE"))


def test_a_missing_key_is_refused_with_where_to_put_it(service: RewardService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLAUDIT_REWARD_API_KEY")
    with RewardClient(settings(service)) as client, pytest.raises(RewardRejected, match="PLAUDIT_REWARD_API_KEY"):
        client.connect()


def test_a_text_that_is_too_long_is_refused_with_the_services_words(service: RewardService) -> None:
    with RewardClient(settings(service)) as client:
        client.connect()
        with pytest.raises(RewardRejected, match=r"items\[1\] has a text of more than 500 characters") as caught:
            client.score(["a", "b"], ["c", "d" * 501])
    assert caught.value.exchange is not None
    assert caught.value.exchange.status is not None
    assert 400 <= caught.value.exchange.status < 500


def test_other_weights_after_a_restart_stop_the_run_and_a_clean_end_has_exit_code_0(tmp_path: Path) -> None:
    service = RewardService(tiny_classifier_dir(tmp_path / "one", seed=1), api_key=KEY)
    try:
        with RewardClient(settings(service)) as client:
            client.connect()
            client.score(PROMPTS[:4], RESPONSES[:4])
            assert service.kill(signal.SIGTERM) == 0
            service.begin(tiny_classifier_dir(tmp_path / "two", seed=2))
            with pytest.raises(RewardRejected, match="revision"):
                client.score(PROMPTS[:4], RESPONSES[:4])
    finally:
        service.kill()
