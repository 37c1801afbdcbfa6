"""The manifests against the API's schemas, and what no schema can say."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from plaudit.errors import EXIT_REJECTED, EXIT_USAGE
from plaudit.ranking_service.settings import Serve
from plaudit.reward_service.engine.metrics import Metrics
from plaudit.reward_service.settings import Settings

OURS = ("Deployment/reward", "Deployment/rank", "Job/trainer")
DIRECTORY = Path(__file__).parents[2] / "deploy" / "kubernetes"


def kustomization() -> Any:
    return yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())


def manifests() -> dict[str, Any]:
    """What kustomize would apply, by kind and name."""
    documents = (
        document
        for resource in kustomization()["resources"]
        for document in yaml.safe_load_all((DIRECTORY / resource).read_text())
    )
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


@pytest.mark.parametrize("name", manifests())
def test_a_manifest_keeps_to_the_schema(name: str) -> None:
    kubernetes_validate.validate(manifests()[name], kubernetes_validate.latest_version(), strict=True)


def test_a_broken_manifest_would_be_seen() -> None:
    broken = manifests()["HorizontalPodAutoscaler/reward"]
    broken["spec"]["maxReplica"] = broken["spec"].pop("maxReplicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_service_disruption_budget_and_autoscaler_mean_the_reward_deployment() -> None:
    all_of_them = manifests()
    deployment = all_of_them["Deployment/reward"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert all_of_them["Service/reward"]["spec"]["selector"] == labels
    budget = all_of_them["PodDisruptionBudget/reward"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    autoscaler = all_of_them["HorizontalPodAutoscaler/reward"]["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == "reward"
    assert "replicas" not in deployment  # it would undo the autoscaler's number with every apply
    assert autoscaler["minReplicas"] > budget["maxUnavailable"]


def test_the_autoscaler_follows_a_metric_that_the_service_has() -> None:
    (metric,) = manifests()["HorizontalPodAutoscaler/reward"]["spec"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in Metrics().exposition().decode()


def test_a_pod_that_ends_has_time_to_drain() -> None:
    pod = manifests()["Deployment/reward"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > Settings(model="any").grace_s
    rank = manifests()["Deployment/rank"]["spec"]
    assert rank["template"]["spec"]["terminationGracePeriodSeconds"] > Serve().grace_s


def test_two_ranking_services_never_share_a_sqlite_file() -> None:
    rank = manifests()["Deployment/rank"]["spec"]
    assert (rank["replicas"], rank["strategy"]) == (1, {"type": "Recreate"})
    assert manifests()["Service/rank"]["spec"]["selector"] == rank["selector"]["matchLabels"]


def test_an_eviction_costs_the_trainer_no_attempt_and_what_cannot_work_is_not_tried_again() -> None:
    job = manifests()["Job/trainer"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert fail["action"] == "FailJob"
    assert set(fail["onExitCodes"]["values"]) == {EXIT_USAGE, EXIT_REJECTED}


def test_no_container_of_ours_is_root_or_writes_to_its_image() -> None:
    for name in OURS:
        pod = manifests()[name]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


def test_every_image_has_a_name_to_replace() -> None:
    images = {
        container["image"] for name in OURS for container in manifests()[name]["spec"]["template"]["spec"]["containers"]
    }
    assert images == {image["name"] for image in kustomization()["images"]}


def test_pods_talk_to_whom_they_must_and_the_key_comes_from_a_secret() -> None:
    all_of_them = manifests()
    assert all_of_them["NetworkPolicy/nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    trainer, reward = (all_of_them[f"NetworkPolicy/{name}"]["spec"] for name in ("trainer", "reward"))
    labels = all_of_them["Deployment/reward"]["spec"]["template"]["metadata"]["labels"]
    assert reward["podSelector"]["matchLabels"] == labels
    assert trainer["egress"][0]["to"][0]["podSelector"]["matchLabels"] == labels
    assert reward["ingress"][0]["from"][0]["podSelector"] == trainer["podSelector"]
    for kind, variable in (("Deployment/reward", "REWARD_API_KEY"), ("Job/trainer", "PLAUDIT_REWARD_API_KEY")):
        [container] = all_of_them[kind]["spec"]["template"]["spec"]["containers"]
        [entry] = [entry for entry in container["env"] if entry["name"] == variable]
        assert entry["valueFrom"]["secretKeyRef"] == {"name": "reward-key", "key": "api-key"}
