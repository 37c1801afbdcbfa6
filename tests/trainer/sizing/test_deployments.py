"""The numbers in the deployment's files are those that `plaudit size` gives for the trainers that the comments name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from plaudit import cli
from plaudit.sizing.advice import Advice, advise
from plaudit.sizing.judges import judge_times
from plaudit.stages.size import workload_of

ROOT = Path(__file__).parents[3]
COMMAND = "plaudit size --step-s 22.2 --texts-per-step 128 --tokens-per-text 17 --trainers 24"


@pytest.fixture(scope="module")
def advice() -> Advice:
    config = cli.parse("size", COMMAND.split()[2:])
    return advise(workload_of(config), judge_times(config.judge), config.trainers, config.wait)


def documents(name: str) -> list[Any]:
    text = (ROOT / name).read_text()
    return list(yaml.safe_load_all(text))


def test_kubernetes(advice: Advice) -> None:
    assert COMMAND in (ROOT / "deploy/kubernetes/reward.yaml").read_text()
    kinds = {document["kind"]: document["spec"] for document in documents("deploy/kubernetes/reward.yaml")}
    autoscaler = kinds["HorizontalPodAutoscaler"]
    assert autoscaler["metrics"][0]["pods"]["target"]["averageValue"] == str(advice.queue_items_target)
    assert autoscaler["minReplicas"] == advice.replicas
    assert kinds["Deployment"]["template"]["spec"]["terminationGracePeriodSeconds"] == advice.grace_s + 15


def test_ray(advice: Advice) -> None:
    assert COMMAND in (ROOT / "deploy/ray/serve.yaml").read_text()
    (deployment,) = documents("deploy/ray/serve.yaml")[0]["applications"][0]["deployments"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == advice.requests_target
    assert deployment["graceful_shutdown_timeout_s"] == advice.grace_s + 10


def test_compose(advice: Advice) -> None:
    assert documents("docker-compose.yml")[0]["services"]["reward"]["stop_grace_period"] == f"{advice.grace_s + 10}s"
