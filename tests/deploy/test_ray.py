"""The reward service over a Ray cluster of two nodes on this machine: `make ray-test`."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.processes import free_port
from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine.scorer import load_scorer
from plaudit.reward_service.settings import Settings
from plaudit.rewards import RewardClient
from plaudit.rewards.settings import RewardSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they are about Ray's own code
    ray = pytest.importorskip("ray", reason="Ray is not installed; run this with `make ray-test`")
    serve = pytest.importorskip("ray.serve")
    cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
WAIT_S = 400.0
TEXTS = [("the movie ", f"was {word} and the plot number {i}") for i, word in enumerate(["good", "bad"] * 200)]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)


def processes_with(mark: str) -> list[str]:
    """The command line of every process that has `mark` in its environment, but for this one."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (directory / "environ").read_bytes() and int(directory.name) != os.getpid():
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # ended meanwhile
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that this test starts."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("PLAUDIT_TEST_MARK", value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A machine with other work takes longer to start Ray's proxy than Ray expects, and Ray would start it again.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
    return value


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes with room for one replica each, and the node that is not its head."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        worker = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster, worker
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def served(cluster: Any, model: Path, directory: Path) -> Iterator[str]:
    """`serve run` with the repository's file: on a free port, with `model`, and quicker to decide."""
    port = free_port()
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    config |= {"http_options": {"host": "127.0.0.1", "port": port}, "proxy_location": "HeadOnly"}
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"]["REWARD_MODEL"] = str(model)
    (deployment,) = application["deployments"]
    deployment["autoscaling_config"] |= {"max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1}
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", cluster.address, str(file)]
    with (directory / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (directory / "serve.log").read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    try:
        until(ready, "the first replica")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def running_replicas() -> int:
    states: dict[str, int] = serve.status().applications["plaudit"].deployments["Reward"].replica_states
    return states.get("RUNNING", 0)


@contextmanager
def scoring_without_pause(url: str) -> Iterator[list[list[float]]]:
    """The trainer's client, asking for all texts again and again; gives the answers so far."""
    answers: list[list[float]] = []
    failures: list[BaseException] = []
    over = threading.Event()
    prompts, responses = zip(*TEXTS, strict=True)

    def score(client: RewardClient) -> None:
        try:
            while not over.is_set():
                answers.append(client.score(prompts, responses))
        except BaseException as error:
            failures.append(error)

    with RewardClient(RewardSettings.of(url=(url,), label="POSITIVE", chunk_size=4, patience_s=WAIT_S)) as client:
        client.connect()
        thread = threading.Thread(target=score, args=(client,))
        thread.start()
        try:
            yield answers
        finally:
            over.set()
            thread.join()
    assert not failures, failures


def test_replicas_spread_over_the_nodes_and_the_loss_of_a_node_loses_no_reward(mark: str, tmp_path: Path) -> None:
    model = tiny_classifier_dir(tmp_path / "model")
    began = time.monotonic()
    with two_nodes() as (cluster, worker), served(cluster, model, tmp_path) as url:
        print(f"one replica ready after {time.monotonic() - began:.1f} s")
        assert running_replicas() == 1
        with scoring_without_pause(url) as answers:
            until(lambda: running_replicas() == 2, "a second replica")
            assert ray.available_resources().get("CPU", 0) == 0  # one of them on either node
            alone = len(answers)
            until(lambda: len(answers) >= alone + 2, "answers of both")

            cluster.remove_node(worker, allow_graceful=False)
            before_loss = len(answers)
            until(lambda: len(answers) >= before_loss + 3, "answers after the loss of a node")
        rounds = f"{alone} rounds until two replicas ran, {before_loss - alone} with both, {len(answers) - before_loss}"
        print(f"{rounds} after the loss of a node; {len(TEXTS)} rewards each, none lost")
        assert running_replicas() >= 1

    scorer = load_scorer(Settings(model=str(model)))
    rows = scorer.score(scorer.encode([(prompt + response, None) for prompt, response in TEXTS]), 0)
    expected = [row[scorer.labels.index("POSITIVE")] for row in rows]
    for answer in answers:
        assert answer == pytest.approx(expected, abs=1e-4)
    until(lambda: not processes_with(mark), f"the end of {processes_with(mark)}")
