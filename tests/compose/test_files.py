"""What can be said about the deployment's files without a Docker engine."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness.machine.prometheus import dashboard_queries
from plaudit.cli import parse
from plaudit.reward_service.engine.metrics import Metrics
from plaudit.run.metrics import MetricsLog
from plaudit.stages.loop import SERVED

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
SPELLINGS = ("docker-compose", "docker compose")
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def exporter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exporter", ROOT / "deploy" / "observability" / "exporter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with MetricsLog(tmp_path / "demo" / "ppo", tensorboard=False) as log:
        log.write(0, {"env/reward_mean": 0.5, "objective/kl": 0.0})
        log.write(1, {"env/reward_mean": 0.75, "objective/kl": float("nan")})
    return tmp_path


def test_every_variable_is_in_the_example_with_its_default() -> None:
    example = dict(re.findall(r"^#(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    for variable, default in VARIABLE.findall((ROOT / COMPOSE_FILES[0]).read_text()):
        assert example[variable] == default, variable
    text = (ROOT / ".env.example").read_text()
    for variable, default in VARIABLE.findall((ROOT / COMPOSE_FILES[1]).read_text()):
        assert example[variable] == default or f"With docker-compose.gpu.yml: {default or 'empty'}" in text, variable


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_both_spellings_of_compose_know_every_key(name: str) -> None:
    document = load(name)
    assert not {"name", "include", "version"} & document.keys()
    for service in document["services"].values():
        assert not {"develop", "configs", "models"} & service.keys()
        assert not isinstance(service.get("depends_on"), dict)


def as_compose_reads(command: str, env_file: Path, *files: str) -> Any:
    """What this spelling makes of these files with the variables of `env_file` and no others of ours."""
    words = command.split()
    if shutil.which(words[0]) is None or subprocess.run([*words, "version"], capture_output=True).returncode != 0:
        pytest.skip(f"`{command}` is not installed")
    ours = re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    done = subprocess.run(
        [*words, "--env-file", str(env_file), *(word for name in files for word in ("-f", name)), "config"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ours},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def devices_of(service: Any) -> list[str]:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    ids: list[str] = device["device_ids"]
    return ids


@pytest.mark.parametrize("command", SPELLINGS)
@pytest.mark.parametrize(
    ("variables", "reward", "trainer"), [("", "1", "0"), ("REWARD_GPU=0", "0", "0"), ("TRAINER_GPU=3", "1", "3")]
)
def test_the_gpu_file_gives_each_half_its_device(
    command: str, variables: str, reward: str, trainer: str, tmp_path: Path
) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"{variables}\n")
    services = as_compose_reads(command, env_file, *COMPOSE_FILES)
    assert devices_of(services["reward"]) == [reward]
    assert devices_of(services["trainer"]) == [trainer]


@pytest.mark.parametrize("command", SPELLINGS)
def test_the_gpu_file_is_the_published_recipe_unless_the_env_file_says_otherwise(command: str, tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("")
    services = as_compose_reads(command, env_file, *COMPOSE_FILES)
    assert services["reward"]["environment"]["REWARD_MODEL"] == "lvwerra/distilbert-imdb"
    assert "--preset=gpt2-imdb" in services["trainer"]["command"]
    assert services["trainer"]["image"] == "plaudit-trainer:cuda"
    assert services["trainer"]["build"]["args"]["TORCH_INDEX_URL"] == ""
    assert services["trainer"]["environment"]["HF_HUB_OFFLINE"] == "0"

    env_file.write_text(
        "UID=1234\nREWARD_MODEL=me/judge\nREWARD_DTYPE=bf16\nPRESET=presets/mine.yaml\nRUN_NAME=mine\nN_PROMPTS=32\n"
        "TAG=mine\nTORCH_INDEX_URL=https://torch.example/cu128\nHF_HUB_OFFLINE=1\nREWARD_BATCH_TOKENS=4096\n"
    )
    services = as_compose_reads(command, env_file, *COMPOSE_FILES)
    reward = services["reward"]["environment"]
    assert (reward["REWARD_MODEL"], reward["REWARD_DTYPE"], reward["REWARD_BATCH_TOKENS"]) == (
        "me/judge",
        "bf16",
        "4096",
    )
    assert {"--preset=presets/mine.yaml", "--output-dir=runs/mine", "--n-prompts=32"} <= {
        *services["trainer"]["command"]
    }
    for half in ("reward", "trainer"):
        assert services[half]["image"] == f"plaudit-{half}:mine"
        assert services[half]["build"]["args"]["TORCH_INDEX_URL"] == "https://torch.example/cu128"
        assert services[half]["environment"]["HF_HUB_OFFLINE"] == "1"
        assert services[half]["user"].startswith("1234:")


def test_nothing_of_ours_runs_as_root_or_writes_to_its_image() -> None:
    ours = {"reward", "balancer", "trainer", "tensorboard", "exporter", "rank", "rank-postgres"}
    ours |= {"loop", "loop-rank", "loop-reward"}
    for name, service in load(COMPOSE_FILES[0])["services"].items():
        if name in ours:
            assert service["read_only"], name
            assert service["user"] == "${UID:-1000}:${GID:-1000}", name
            assert service["cap_drop"] == ["ALL"], name


def test_rankings_are_in_a_volume_of_their_own_and_nobody_ranks_unless_asked_to() -> None:
    document = load(COMPOSE_FILES[0])
    rank, over_postgres, postgres = (document["services"][name] for name in ("rank", "rank-postgres", "postgres"))
    assert rank["volumes"] == ["rankings:/data"]
    assert rank["environment"]["RANK_DATABASE"].startswith("/data/")
    assert postgres["volumes"] == ["postgres:/var/lib/postgresql/data"]
    assert {"rankings", "postgres"} <= document["volumes"].keys()
    assert (rank["profiles"], over_postgres["profiles"], postgres["profiles"]) == (
        ["ranking"],
        ["postgres"],
        ["postgres"],
    )


def test_the_loop_talks_to_its_own_services_and_each_serves_what_it_writes() -> None:
    services = load(COMPOSE_FILES[0])["services"]
    command, *flags = services["loop"]["command"]
    config = parse(command, [VARIABLE.sub(lambda found: found[2], flag) for flag in flags])
    assert (config.rounds, config.resume) == (2, "auto")
    assert config.simulated.annotators >= config.people.overlap
    asked = {urlsplit(url).hostname for url in (config.rank_url, config.judge, *config.reward_urls)}
    assert asked == {"loop-rank", "balancer", "loop-reward"}
    assert asked <= set(services["loop"]["depends_on"])
    reads = Path(VARIABLE.sub(lambda found: found[2], services["loop-reward"]["environment"]["REWARD_MODEL"]))
    assert reads == Path("/app") / config.output_dir / SERVED
    assert "./runs:/app/runs:ro" in services["loop-reward"]["volumes"]
    assert "./runs:/app/runs" in services["loop"]["volumes"]
    assert all(services[name]["profiles"] == ["loop"] for name in ("loop", "loop-rank", "loop-reward"))
    # Programs rank over plain http here, which a session cookie for browsers would not travel over.
    assert services["loop-rank"]["environment"]["RANK_SECURE_COOKIES"] == "false"
    for key in ("RANK_API_KEY", "REWARD_ADMIN_KEY"):
        assert key in services["loop"]["environment"]
        assert any(key in services[name]["environment"] for name in ("loop-rank", "loop-reward"))


def test_the_exporter_gives_each_runs_newest_step(exporter: ModuleType, runs: Path) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exporter.exposition(runs))}
    (sample,) = families["plaudit_trainer_env_reward_mean"].samples
    assert (sample.labels, sample.value) == ({"run": "demo/ppo"}, 0.75)
    assert "plaudit_trainer_objective_kl" not in families


def test_the_exporter_skips_a_line_that_is_still_being_written(exporter: ModuleType, runs: Path) -> None:
    with (runs / "demo" / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "env/rew')
    assert 'plaudit_trainer_step{run="demo/ppo"} 1\n' in exporter.exposition(runs)


def test_the_dashboard_asks_for_metrics_that_the_reward_service_has() -> None:
    asked = {name for query in dashboard_queries() for name in re.findall(r"plaudit_reward_\w+", query)}
    metrics = Metrics()
    metrics.refused_requests.labels("queue-full")
    metrics.phase.labels("queue")
    exposed = {
        sample.name
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }
    assert asked
    assert asked <= exposed


def test_every_container_is_confined_and_bounded() -> None:
    for name, service in load(COMPOSE_FILES[0])["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"], name
        assert service["mem_limit"], name


@pytest.mark.parametrize("image", ["rank", "reward", "trainer"])
def test_the_images_dependencies_are_locked_with_their_hashes(image: str) -> None:
    text = (ROOT / "deploy" / f"{image}.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE))
    assert len(locked) == len(re.findall(r"^\S", text, re.MULTILINE)), "each has a version and a hash"
    assert not {"torch", "triton"} & locked.keys()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = {"reward": ("reward", "otel"), "trainer": ("trainer",), "rank": ("rank", "rank-postgres")}[image]
    needs = subprocess.run(
        [sys.executable, "deploy/requirements.py", *extras], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in re.findall(r"^[\w-]+", needs, re.MULTILINE):
        if name not in ("torch", "uvloop"):
            assert locked[name.lower().replace("_", "-")] == pinned.get(name, locked[name.lower().replace("_", "-")])


def test_a_base_image_is_an_argument() -> None:
    for name in ("Dockerfile.rank", "Dockerfile.reward", "Dockerfile.trainer", "deploy/balancer/Dockerfile"):
        assert "ARG BASE_IMAGE=python:3.11-slim\nFROM ${BASE_IMAGE}\n" in (ROOT / name).read_text()
