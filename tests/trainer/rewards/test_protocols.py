"""One reward, nine protocols: whichever is spoken, the same raw logit comes back for the same text."""

import itertools
from typing import Any

import pytest

from harness.foreign import stand_ins as foreign
from plaudit.rewards import RewardClient, RewardRejected
from plaudit.rewards.settings import RewardSettings

PROMPTS = [f"prompt {i}" for i in range(20)]
RESPONSES = [f" response {i}" for i in range(20)]
POSITIVE = [foreign.logits(p + r)[1] for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def settings(url: str, **changes: Any) -> RewardSettings:
    return RewardSettings.of(url=(url,), patience_s=30.0, **{"label": "POSITIVE"} | changes)


def connect_and_score(client: RewardClient) -> list[float]:
    client.connect()
    return client.score(PROMPTS, RESPONSES)


# Defect 12: the reward was taken by its place in the answer, and servers put the best label first.
@pytest.mark.parametrize("kind", foreign.SPOKEN)
def test_the_raw_logit_of_the_label_comes_back_in_order(kind: str) -> None:
    server, changes = foreign.SPOKEN[kind]
    with foreign.serving(server) as url, RewardClient(settings(url, kind=kind, **{"label": None} | changes)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == POSITIVE


@pytest.mark.parametrize(
    ("server", "changes", "model"),
    [
        (foreign.tei, {}, "tei/model"),
        (foreign.vllm, {"label_index": 1}, "vllm/model"),
        (foreign.sglang, {"label": None}, "sglang/model"),
        (foreign.infinity, {}, "infinity/model"),
        (foreign.kserve, {"label_index": 1, "model": "judge"}, "judge"),
    ],
    ids=["tei", "vllm", "sglang", "infinity", "kserve"],
)
def test_a_server_that_describes_itself_is_recognised(
    server: foreign.Server, changes: dict[str, Any], model: str
) -> None:
    with foreign.serving(server) as url, RewardClient(settings(url, **changes)) as client:
        assert client.connect().id == model
        assert client.score(PROMPTS, RESPONSES) == POSITIVE


@pytest.mark.parametrize(
    ("server", "changes", "model"),
    [(foreign.vllm, {"label_index": 1}, "vllm/model"), (foreign.infinity, {}, "infinity/model")],
    ids=["vllm", "infinity"],
)
def test_a_server_below_a_prefix_is_recognised_there(
    server: foreign.Server, changes: dict[str, Any], model: str
) -> None:
    with (
        foreign.serving(foreign.below("/v1", server)) as url,
        RewardClient(settings(f"{url}/v1/", **changes)) as client,
    ):
        assert client.connect().id == model
        assert client.score(PROMPTS, RESPONSES) == POSITIVE


def test_infinity_below_v1_is_not_taken_for_vllm() -> None:
    with (
        foreign.serving(foreign.below("/v1", foreign.infinity)) as url,
        RewardClient(settings(url, label_index=1)) as client,
        pytest.raises(RewardRejected, match="not recognised"),
    ):
        client.connect()


def test_a_server_that_is_not_recognised_is_refused_with_the_kinds_there_are() -> None:
    with (
        foreign.serving(foreign.openrlhf) as url,
        RewardClient(settings(url)) as client,
        pytest.raises(RewardRejected, match=r"--reward\.kind.*openrlhf.*kserve"),
    ):
        client.connect()


def test_the_order_of_an_answer_with_indices_is_that_of_its_indices() -> None:
    with (
        foreign.serving(foreign.vllm_out_of_order) as url,
        RewardClient(settings(url, label_index=1)) as client,
    ):
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == POSITIVE


def test_tei_keeps_to_the_servers_batch_limit_and_has_its_revision() -> None:
    with foreign.serving(foreign.tei) as url, RewardClient(settings(url, chunk_size=20)) as client:
        info = client.connect()
        assert (info.limits.max_items, info.revision, info.labels) == (8, "abc123", foreign.LABELS)
        assert client.score(PROMPTS, RESPONSES) == POSITIVE


@pytest.mark.parametrize(
    ("kind", "server", "changes", "message"),
    [
        ("tei", foreign.tei, {"label": "GOOD"}, "no label 'GOOD'.*NEGATIVE, POSITIVE"),
        ("tei", foreign.tei, {"label": None}, "several labels"),
        ("openrlhf", foreign.openrlhf, {}, r"no labels.*leave out reward\.label"),
        ("infinity", foreign.infinity, {"label": None}, "several labels: choose one with --reward.label: .*POSITIVE"),
        ("hf-inference", foreign.hf_inference, {"label": None}, "several labels"),
        ("vllm-classify", foreign.vllm, {}, r"--reward\.label-index"),
        ("vllm-classify", foreign.vllm, {"label_index": 2}, "label_index=2, but 2 logits"),
        ("vllm-classify", foreign.vllm, {"label_index": 0}, "reward.label_index=0 is 'NEGATIVE'"),
        ("vllm-classify", foreign.vllm_repeating_an_index, {"label_index": 1}, "indices are"),
        ("vllm-classify", foreign.old_vllm, {"label_index": 1}, "probabilities came back"),
        ("vllm-pooling", foreign.old_vllm, {"label_index": 1}, "probabilities came back"),
        ("vllm-classify", foreign.vllm, {"label_index": 1, "model": "other"}, "no such model"),
        ("infinity", foreign.infinity_0_0_78, {}, "probabilities came back"),
        ("infinity", foreign.with_sigmoids, {}, "every score lies between 0 and 1"),
        ("infinity", foreign.infinity, {"model": "other"}, r"--reward\.model: infinity/model"),
        ("infinity", foreign.infinity, {"label": "GOOD"}, "'GOOD' is not among"),
        ("hf-inference", foreign.hf_best_label_only, {}, "not a list of lists"),
        ("hf-inference", foreign.hf_inference, {"label": "GOOD"}, "'GOOD' is not among"),
        ("kserve", foreign.kserve, {"label_index": 1}, r"--reward\.model"),
        ("kserve", foreign.kserve, {"model": "other"}, "Model with name other does not exist"),
        ("plaudit", foreign.tei, {}, "404"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    kind: str, server: foreign.Server, changes: dict[str, Any], message: str
) -> None:
    with (
        foreign.serving(server) as url,
        RewardClient(settings(url, kind=kind, **changes)) as client,
        pytest.raises(RewardRejected, match=message),
    ):
        connect_and_score(client)


def test_probabilities_are_taken_when_that_is_meant() -> None:
    expected = [foreign.softmax(foreign.logits(p + r))[1] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with (
        foreign.serving(foreign.old_vllm) as url,
        RewardClient(settings(url, label_index=1, accept_probabilities=True)) as client,
    ):
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == expected


@pytest.mark.parametrize("value", [None, "0.5", True, float("nan"), float("inf"), [0.5]])
def test_no_protocol_turns_a_broken_value_into_a_reward(value: object) -> None:
    calls = itertools.count()

    def server(method: str, path: str, body: Any) -> tuple[int, Any]:
        status, answer = foreign.openrlhf(method, path, body)
        if next(calls):
            answer["rewards"][0] = value
        return status, answer

    with (
        foreign.serving(server) as url,
        RewardClient(settings(url, kind="openrlhf", label=None, check_order=False)) as client,
    ):
        client.connect()
        client.score(PROMPTS[:2], RESPONSES[:2])
        with pytest.raises(RewardRejected, match="finite number"):
            client.score(PROMPTS[:2], RESPONSES[:2])


def test_a_failed_forward_pass_of_tei_is_retried() -> None:
    calls = itertools.count()

    def server(method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "POST" and next(calls) == 0:
            return 424, {"error": "inference failed", "error_type": "Backend"}
        return foreign.tei(method, path, body)

    with foreign.serving(server) as url, RewardClient(settings(url)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == POSITIVE
