"""The stack as it is deployed, on a real engine: `make compose-test`. Builds images, so it runs only when asked."""

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.machine.balancer import STATISTICS, asking_without_pause, replicas_up_in
from harness.machine.compose import CALLER, ROOT, Project, answers, docker, reason_to_skip, until
from harness.machine.prometheus import Prometheus, dashboard_queries
from harness.processes import free_port
from harness.reward_service import status_of_a_request

RUN_NAME = "compose-test"
RUN = ROOT / "runs" / RUN_NAME
PRESET = ROOT / "runs" / f"{RUN_NAME}.yaml"
STEPS = 30
OBSERVABILITY = ("--profile", "observability")
SKIP = reason_to_skip()
pytestmark = [pytest.mark.skipif(SKIP is not None, reason=str(SKIP)), pytest.mark.timeout(3600)]


class Stack(Project):
    """The Compose project under test, with ports and a name of its own."""

    def __init__(self) -> None:
        self.tensorboard = free_port()
        self.balancer = free_port()
        self.prometheus = free_port()
        super().__init__(
            "plaudit-test",
            {
                "RUN_NAME": RUN_NAME,
                "PRESET": f"runs/{PRESET.name}",
                "N_PROMPTS": "64",
                "TENSORBOARD_PORT": str(self.tensorboard),
                "BALANCER_PORT": str(self.balancer),
                "PROMETHEUS_PORT": str(self.prometheus),
            },
        )

    def replicas_up(self) -> int:
        """How many reward services the balancer sends requests to."""
        code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:8405{STATISTICS}').read().decode())"
        return replicas_up_in(docker("exec", *self.containers("balancer"), "python3", "-c", code))

    def kill_and_restart(self, replica: str) -> tuple[int, int]:
        """Kill one of two replicas under load and start it again: how many requests were lost, and how many there were.

        Returns when a step has been done since the kill.
        """
        until(lambda: self.replicas_up() == 2, "both replicas")
        with asking_without_pause(self.balancer) as statuses:
            until(lambda: statuses.total() >= 50, "fifty requests")
            docker("kill", replica)
            seen, before = len(steps()), statuses.total()
            until(lambda: self.replicas_up() == 1, "the balancer to notice")
            until(lambda: statuses.total() >= before + 50, "fifty requests more")
            until(lambda: seen == STEPS or len(steps()) > seen, "a step after the kill")
            docker("start", replica)
            until(lambda: self.replicas_up() == 2, "the replica's return")
        return statuses.total() - statuses[200], statuses.total()


def steps() -> list[int]:
    """The steps in metrics.jsonl, in the order in which they were written."""
    path = RUN / "ppo" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    os.chown(RUN, CALLER, -1)
    settings = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text())
    settings |= {"steps": STEPS, "generation": {"batch_size": 32}}
    settings["ppo"] |= {"batch_size": 32, "mini_batch_size": 32}
    PRESET.write_text(yaml.safe_dump(settings))
    stack = Stack()
    try:
        stack.compose("build")
        print(docker("images", "--filter=reference=plaudit-*", "--format={{.Repository}}:{{.Tag}} {{.Size}}"))
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail=40"))
        stack.compose(*OBSERVABILITY, "down", "--volumes", "--remove-orphans")
        PRESET.unlink()


def test_a_killed_replica_and_a_stopped_trainer_cost_nothing(stack: Stack) -> None:
    began = time.monotonic()
    stack.compose("up", "-d", "--scale", "reward=2")
    started = time.monotonic()
    until(lambda: len(steps()) >= 1, "the first step")
    print(f"`up` to the end of the first step: {time.monotonic() - began:.1f} s, of it `up`: {started - began:.1f} s")

    first, second = stack.containers("reward")
    lost, asked = stack.kill_and_restart(first)
    docker("stop", "-t", "120", *stack.containers("trainer"))
    print(f"the trainer stopped after step {len(steps())} of {STEPS}")
    assert stack.exit_code("trainer") == 128 + 15
    stopped_after = len(steps())
    assert stopped_after < STEPS
    assert (RUN / "ppo" / "checkpoints" / f"step-{stopped_after:06d}" / "manifest.json").is_file()

    stack.compose("up", "-d", "--no-recreate", "trainer")
    until(lambda: len(steps()) > stopped_after, "a step of the resumed trainer")
    more_lost, more_asked = stack.kill_and_restart(second)
    print(f"{lost + more_lost} of {asked + more_asked} requests of other callers lost, with each replica killed once")
    assert lost + more_lost == 0
    assert stack.exit_code("trainer") == 0
    assert steps() == list(range(STEPS))

    log = stack.compose("logs", "--no-color", "trainer")
    assert f"resuming after step {stopped_after}" in log
    assert "before" in log
    assert "after" in log
    print(log[-3000:])


def test_the_results_are_on_the_host_and_belong_to_the_caller(stack: Stack) -> None:
    evaluation = json.loads((RUN / "evaluation.json").read_text())
    assert evaluation
    for name in ("report.html", "samples.csv", "ppo/adapter_model.safetensors", "ppo/value_head.safetensors"):
        assert (RUN / name).stat().st_uid == CALLER, name


def test_tensorboard_shows_the_run(stack: Stack) -> None:
    def shown() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{stack.tensorboard}/data/runs", timeout=10) as answer:
            return any(run.startswith(RUN_NAME) for run in json.load(answer))

    until(shown, "TensorBoard to read the run")


def test_the_balancer_answers_for_the_service_on_a_port_of_the_host(stack: Stack) -> None:
    assert status_of_a_request(stack.balancer) == 200


def test_prometheus_scrapes_every_replica_the_balancer_and_the_trainer(stack: Stack) -> None:
    image = next(
        word for word in stack.compose(*OBSERVABILITY, "config").split() if word.startswith("prom/prometheus:")
    )
    tag = {}
    if not answers("docker", "image", "inspect", image) and not answers("docker", "pull", image):
        print(f"{image} can't be had here: Prometheus of Debian's packages instead")
        docker("build", "-t", "prom/prometheus:debian", str(Path(__file__).parent / "prometheus"))
        tag = {"PROMETHEUS_TAG": "debian"}
    services = ("reward", "exporter", "prometheus")
    stack.compose(*OBSERVABILITY, "up", "-d", "--no-recreate", "--scale", "reward=2", *services, **tag)
    prometheus = Prometheus(f"http://127.0.0.1:{stack.prometheus}")

    def scraped() -> bool:
        try:
            return prometheus.jobs_up() == ["balancer", "reward", "reward", "trainer"]
        except OSError:
            return False

    until(scraped, "Prometheus to scrape everything")
    with asking_without_pause(stack.balancer):
        assert status_of_a_request(stack.balancer, "no such label") == 422
        until(lambda: not prometheus.without_data(), "data for every query of the dashboard")
    for query in dashboard_queries():
        print(f"{len(prometheus.result(query))} series for {query}")
    assert len(prometheus.result("plaudit_reward_queue_items")) == 2


def test_a_remote_endpoint_needs_the_trainer_alone_and_a_stop_ends_the_wait_for_it(stack: Stack) -> None:
    stack.compose(*OBSERVABILITY, "down")
    remote = {"REWARD_URL": "https://rewards.example", "RUN_NAME": f"{RUN_NAME}/alone"}
    stack.compose("up", "-d", "trainer", **remote)
    (trainer,) = docker("ps", "-aq", "-f", "label=com.docker.compose.project=plaudit-test").split()
    until(
        lambda: " s more: https://rewards.example: connection failed" in docker("logs", trainer), "the trainer to wait"
    )
    docker("stop", "-t", "60", trainer)
    assert stack.exit_code("trainer") == 128 + 15
    assert "stopped by SIGTERM" in docker("logs", trainer)


@pytest.mark.parametrize("half", ["reward", "trainer"])
def test_each_image_holds_its_own_half_and_no_root(stack: Stack, half: str) -> None:
    code = (
        "import importlib.util as u, os; names = 'plaudit.wire plaudit.reward_service plaudit.stages trl fastapi'; "
        "print(os.getuid(), *[name for name in names.split() if u.find_spec(name)])"
    )
    seen = docker("run", "--rm", "--read-only", "--entrypoint", "python", f"plaudit-{half}:cpu", "-c", code)
    expected = {
        "reward": "plaudit.wire plaudit.reward_service fastapi",
        "trainer": "plaudit.wire plaudit.stages trl",
    }
    assert seen == f"1000 {expected[half]}"
