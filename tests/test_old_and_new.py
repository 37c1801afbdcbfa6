"""The code from before the newest change of the wire and the code from after it, as each other's client and service."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.reward_service import RewardService, python_path
from harness.tiny_models import tiny_classifier_dir
from plaudit import wire

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NEWEST = "class ChatMessage"
"""What the wire's file has since its newest version."""
CLIENT = """
import json, sys
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings
settings = RewardSettings.of(url=tuple(sys.argv[1:]), patience_s=120.0, label="POSITIVE", chunk_size=2)
with RewardClient(settings) as client:
    client.connect()
    print(json.dumps("connected"), flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        print(json.dumps(client.score(texts, [" was it"] * len(texts))), flush=True)
"""


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the code from before the newest version of the wire."""
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository") == b"true\n":
        pytest.skip("a checkout without its history does not have the older code")
    commits = git("log", "-S", NEWEST, "--format=%H", "--", "services/plaudit/wire/rewards.py").decode().split()
    if not commits:
        pytest.skip("the history here begins after the change")
    changed = commits[-1]
    tree = tmp_path_factory.mktemp("older")
    archive = git("archive", f"{changed}^", "services", "trainer")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    assert NEWEST not in (tree / "services/plaudit/wire/rewards.py").read_text()
    assert wire.WIRE_VERSION == 2
    return tree


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier_dir(tmp_path_factory.mktemp("classifier"))


@contextmanager
def asking(tree: Path, *urls: str) -> Iterator["subprocess.Popen[str]"]:
    """A client of that checkout's, which scores what is written to it, a list of texts a line."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, *urls],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path(tree)},
    )
    with client:
        assert client.stdout is not None
        assert json.loads(client.stdout.readline()) == "connected"
        yield client


def rewards(client: "subprocess.Popen[str]", texts: list[str]) -> list[float]:
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps(texts) + "\n")
    client.stdin.flush()
    answer: list[float] = json.loads(client.stdout.readline())
    return answer


@pytest.mark.parametrize("client_is", ["old", "new"])
@pytest.mark.parametrize("service_becomes", ["new", "old"])
def test_every_reward_is_right_through_a_rolling_change_of_two_replicas(
    older: Path, classifier_dir: Path, client_is: str, service_becomes: str
) -> None:
    trees = {"old": older, "new": ROOT}
    before, after = ("old", "new") if service_becomes == "new" else ("new", "old")
    texts = [f"this movie number {number}" for number in range(12)]
    replicas = [RewardService(classifier_dir) for _ in range(2)]
    try:
        for replica in replicas:
            replica.kill(signal.SIGTERM)
            replica.run_code_of(trees[before])
            replica.begin()
            replica.wait_until_ready()
        with asking(trees[client_is], *(replica.url for replica in replicas)) as client:
            expected = rewards(client, texts)
            assert len(set(expected)) > 1
            for replica in replicas:
                replica.kill(signal.SIGTERM)
                assert rewards(client, texts) == pytest.approx(expected, abs=1e-5)
                replica.run_code_of(trees[after])
                replica.begin()
                replica.wait_until_ready()
                assert rewards(client, texts) == pytest.approx(expected, abs=1e-5)
            client.kill()
    finally:
        for replica in replicas:
            replica.kill()
