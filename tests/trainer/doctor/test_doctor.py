"""`plaudit doctor` with each fault made for real: programs on PATH, files, full disks, dead servers."""

import http.server
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.machine.disks import fill, small_disk
from harness.stub_reward_server import StubRewardServer
from plaudit import cli
from plaudit.doctor import docker, gpu, hub, machine, network, python
from plaudit.doctor.findings import Finding
from plaudit.errors import ConfigError
from plaudit.settings.doctor import DoctorConfig

NONE_OF_THIS_MACHINE = ("hub", "docker", "notebook")
"""Subjects whose findings depend on where the tests run."""


def program(directory: Path, name: str, text: str) -> Path:
    """A shell script on PATH."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)
    return directory


def package(site: Path, name: str, version: str, *requires: str, **files: str) -> Path:
    """A package that looks installed, with these files in its folder."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise RuntimeError('nobody imports this')")
    for file, text in files.items():
        (site / name / file.replace("__", ".")).write_text(text)
    described(site, name, version, *requires)
    return site


def described(site: Path, name: str, version: str, *requires: str) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def examined(*flags: str, site: Path | None = None, **environment: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code of the command in a process of its own, and its findings by subject."""
    code = "import sys; from plaudit import cli; code = cli.run(['doctor', *sys.argv[1:]]); "
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    paths = [*([str(site)] if site else []), *sys.path]
    skip = ["--skip", *NONE_OF_THIS_MACHINE] if "--skip" not in flags else []
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", *flags, *skip],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        by_subject.setdefault(finding["subject"], []).append(finding)
    return done.returncode, by_subject


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def is_wrong(finding: Finding, says: str, fix: str) -> None:
    assert finding.status == "wrong"
    assert says in finding.says
    assert finding.fix is not None
    assert fix in finding.fix


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_here_all_but_this_machines_network_is_fine_and_torch_is_not_imported() -> None:
    code, found = examined()
    assert code == 0
    assert {"python", "extras", "gpu", "bitsandbytes", "threads", "memory", "disk", "proxies"} <= found.keys()


def test_a_fault_is_a_line_with_its_remedy_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    skip = ["python", "extras", "gpu", "bitsandbytes", "hub", "proxies", "docker", "notebook"]
    assert cli.run(["doctor", "--skip", *skip]) == 1
    said = capsys.readouterr()
    assert "wrong threads: OMP_NUM_THREADS=none is no number of threads\n         -> unset OMP_NUM_THREADS" in said.out
    assert said.err.startswith("plaudit doctor: 1 of 3 findings are wrong")


@pytest.mark.parametrize(("version", "status"), [((3, 10, 4), "wrong"), ((3, 11, 0), "ok"), ((3, 15, 0), "note")])
def test_the_python_version(version: tuple[int, ...], status: str) -> None:
    assert only(python.check_python(version)).status == status


def test_a_missing_package_and_an_old_one_are_named_with_the_extra_that_brings_them(tmp_path: Path) -> None:
    described(
        tmp_path,
        "plaudit",
        "9",
        'there-is-no-such-package>=1; extra == "trainer"',
        'pydantic>=99; extra == "trainer"',
        'neither-this; extra == "reward"',
    )
    code, found = examined(site=tmp_path)
    assert code == 1
    trainer, reward, rank = found["extras"]
    assert (trainer["status"], reward["status"], rank["status"]) == ("wrong", "note", "ok")
    assert "there-is-no-such-package is missing" in trainer["says"]
    assert "is not >=99" in trainer["says"]
    assert trainer["fix"] == "pip install 'plaudit[trainer]'"
    assert "neither-this is missing" in reward["says"]


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "says", "fix"),
    [
        ("'12.8'", "570.86.10", "ok", "driver 570.86; torch 9.1 is built for CUDA 12.8", ""),
        ("'13.0'", "570.86.10", "wrong", "too old for torch 9.1, which is built for CUDA 13.0", "whl/cu126"),
        ("'12.8'", "450.80.02", "wrong", "too old for torch 9.1, which is built for CUDA 12.8", "whl/cu118"),
        ("None", "580.65.06", "wrong", "but torch 9.1 is a build for CPUs", "whl/cu130"),
    ],
)
def test_torch_is_held_against_the_driver(
    cuda: str, driver: str, status: str, says: str, fix: str, tmp_path: Path
) -> None:
    site = package(tmp_path / "site", "torch", "9.1", version__py=f"cuda: Optional[str] = {cuda}\n")
    path = program(tmp_path / "bin", "nvidia-smi", f"echo 'Fake GPU, {driver}, 81920'")
    _, found = examined(site=site, PATH=f"{path}:{os.environ['PATH']}")
    (finding,) = found["gpu"]
    assert finding["status"] == status
    assert says in finding["says"]
    assert fix in (finding["fix"] or "")


def test_a_driver_that_does_not_answer_is_not_taken_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    monkeypatch.setenv("PATH", str(path), prepend=os.pathsep)
    assert gpu.driver_of(5) == "Failed to initialize NVML: Driver/library version mismatch"
    program(tmp_path, "nvidia-smi", "exec sleep 60")
    assert gpu.driver_of(0.2) == "no answer within 0.2 s"


@pytest.mark.parametrize(
    ("libraries", "override", "status", "says", "fix"),
    [
        (["cuda128", "cpu"], None, "ok", "with a native library for CUDA 12.8", ""),
        (["cuda126", "cpu"], None, "wrong", "torch is built for CUDA 12.8", "export BNB_CUDA_VERSION=126"),
        (["cpu"], None, "wrong", "its native libraries are for CUDA none", "pip install -U bitsandbytes"),
        (["cuda126", "cpu"], "126", "ok", "for CUDA 12.6 (BNB_CUDA_VERSION)", ""),
        (["cuda128", "cpu"], "118", "wrong", "BNB_CUDA_VERSION=118, but", "unset BNB_CUDA_VERSION"),
    ],
)
def test_bitsandbytes_needs_a_native_library_for_torchs_cuda(
    libraries: list[str], override: str | None, status: str, says: str, fix: str, tmp_path: Path
) -> None:
    site = package(tmp_path / "site", "torch", "9.1", version__py="cuda: Optional[str] = '12.8'\n")
    package(site, "bitsandbytes", "0.50", **{f"libbitsandbytes_{name}__so": "" for name in libraries})
    path = program(tmp_path / "bin", "nvidia-smi", "echo 'Fake GPU, 570.86.10, 81920'")
    changes = {"BNB_CUDA_VERSION": override} if override else {}
    _, found = examined(site=site, PATH=f"{path}:{os.environ['PATH']}", **changes)
    (finding,) = found["bitsandbytes"]
    assert finding["status"] == status
    assert says in finding["says"]
    assert fix in (finding["fix"] or "")


def test_bitsandbytes_without_its_cpu_library_is_wrong_where_there_is_no_gpu(tmp_path: Path) -> None:
    site = package(tmp_path, "bitsandbytes", "0.50", libbitsandbytes_cuda128__so="")
    _, found = examined(site=site, PATH=str(tmp_path / "nothing"))
    (finding,) = found["bitsandbytes"]
    assert finding["status"] == "wrong"
    assert "has no native library for CPUs" in finding["says"]


def test_a_notebook_without_ipywidgets_shows_no_progress_bars(tmp_path: Path) -> None:
    skip = ["--skip", "hub", "docker"]
    blocked = package(tmp_path / "with", "ipywidgets", "8.1")
    _, found = examined(*skip, site=blocked, JPY_PARENT_PID="1")
    assert found["notebook"][0]["status"] == "ok"
    if importlib.util.find_spec("ipywidgets") is None:
        code, found = examined(*skip, JPY_PARENT_PID="1")
        assert code == 1
        assert found["notebook"][0]["fix"].startswith("pip install ipywidgets")


class Missing(http.server.BaseHTTPRequestHandler):
    """Has nothing."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing to stderr."""


@pytest.fixture
def web() -> Iterator[str]:
    """A server that answers 404 to everything, as a hub may."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Missing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_hub_answers_is_dead_or_is_not_to_be_used(web: str, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path)}
    assert next(iter(hub.check_hub(5, {"HF_ENDPOINT": web, **home}))).status == "ok"
    dead = f"http://127.0.0.1:{free_port()}"
    is_wrong(next(iter(hub.check_hub(5, {"HF_ENDPOINT": dead, **home}))), "Connection refused", "HF_HUB_OFFLINE=1")
    offline = next(iter(hub.check_hub(5, {"HF_ENDPOINT": dead, "HF_HUB_OFFLINE": "1", **home})))
    assert (offline.status, offline.says[:14]) == ("note", "HF_HUB_OFFLINE")


def test_a_dead_proxy_keeps_the_hub_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    environment = {"HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path)}
    is_wrong(next(iter(hub.check_hub(5, environment))), "Connection refused", "HTTPS_PROXY")


def test_a_cache_that_is_full_or_read_only_or_a_file_is_wrong(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        environment = {"HF_HOME": str(disk / "deep" / "cache")}
        assert only(hub.check_cache(environment)).status == "ok"
        filler = fill(disk)
        is_wrong(only(hub.check_cache(environment)), "No space left on device", "export HF_HOME=")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        is_wrong(only(hub.check_cache(environment)), "Read-only file system", "export HF_HOME=")
    (tmp_path / "file").write_text("")
    is_wrong(only(hub.check_cache({"HF_HUB_CACHE": str(tmp_path / "file" / "hub")})), "Not a directory", "HF_HOME")


def test_a_small_disk_is_too_small(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        found = {finding.subject: finding for finding in machine.check_machine(disk / "runs", {})}
        is_wrong(found["disk"], f"0.00 GiB free at {disk}", "--output-dir")
        settings = disk / "whole.yaml"
        settings.write_text("policy: imdb-gpt2-mini\nlora: {enabled: false}\n")
        is_wrong(only(machine.check_preset(settings, disk / "runs")), "on disk, and 0.00 GiB are free", "make room")


def test_a_containers_memory_limit_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2 * 2**30}\n")
    assert machine.free_memory() == 2**30
    found = {finding.subject: finding for finding in machine.check_machine(tmp_path, {})}
    is_wrong(found["memory"], "1.0 GiB free", "raise the container's limit")


def test_a_policy_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert machine.parameters_of(tmp_path) == 10**12
    (tmp_path / "large.yaml").write_text(f"policy: {tmp_path}\n")
    finding = only(machine.check_preset(tmp_path / "large.yaml", tmp_path))
    is_wrong(finding, "a policy of 1000000.0 million parameters takes at least 3725.3 GiB of memory", "--model.quant")


def test_a_preset_that_fits_and_one_whose_size_is_not_known(tmp_path: Path) -> None:
    assert only(machine.check_preset(Path("demo"), tmp_path)).status == "ok"
    assert "is not a local model" in only(machine.check_preset(Path("gpt2-imdb"), tmp_path)).says
    with pytest.raises(ConfigError, match="no such config file"):
        list(machine.check_preset(Path("absent"), tmp_path))


def test_threads_are_held_against_the_cores_of_this_process() -> None:
    _, found = examined(OMP_NUM_THREADS="4096")
    assert found["threads"][0]["status"] == "wrong"
    assert found["threads"][0]["says"].startswith("OMP_NUM_THREADS=4096 is more than")
    if (os.cpu_count() or 1) > 1 and hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            one = next(iter(machine.check_machine(Path(), {})))
        finally:
            os.sched_setaffinity(0, allowed)
        is_wrong(one, "this process may use 1 cores of", "export OMP_NUM_THREADS=1")


def test_a_containers_share_of_the_cores_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cores() == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores() >= 1


@pytest.mark.parametrize(
    ("environment", "status", "says"),
    [
        ({}, "ok", "no variable names one"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "note", "is reached through the proxy http://proxy:3128 (HTTPS_PROXY)"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "huggingface.co"}, "note", "is reached without a proxy"),
        ({"https_proxy": "http://"}, "wrong", "https_proxy=http:// is no proxy's address"),
        ({"https_proxy": "ftp://proxy:21"}, "wrong", "https_proxy=ftp://proxy:21 can't be used"),
    ],
)
def test_proxy_variables(environment: dict[str, str], status: str, says: str) -> None:
    finding = only(network.check_proxies(None, environment))
    assert finding.status == status
    assert says in finding.says
    assert (finding.fix is not None) == (status == "wrong")


def test_a_reward_service_is_asked_for_health_label_and_revision(stub_reward_server: StubRewardServer) -> None:
    url = stub_reward_server.url
    fine = only(network.check_reward(url, None, None, 5))
    assert fine.status == "ok"
    revision = fine.says.partition("its revision is ")[2]
    assert only(network.check_reward(url, None, revision, 5)).status == "ok"
    is_wrong(only(network.check_reward(url, "LOVELY", None, 5)), "LOVELY", "--label")
    other = only(network.check_reward(url, None, "sha256:other", 5))
    is_wrong(other, f"serves the revision {revision}, not sha256:other", "plaudit-reward --model")


def test_a_dead_reward_service(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = only(network.check_reward(f"http://127.0.0.1:{free_port()}", None, None, 0.5))
    is_wrong(finding, "does not answer", "plaudit-reward --model DIR")
    is_wrong(only(network.check_reward("127.0.0.1:8000", None, None, 0.5)), "must start with http://", "--reward-url")


INFO = {"ServerVersion": "28.1", "Runtimes": {"runc": {}}}


@pytest.mark.parametrize(
    ("script", "has_gpu", "expected"),
    [
        ("echo 'Cannot connect to the Docker daemon'; exit 1", False, [("wrong", "Cannot connect to the Docker")]),
        (f"echo '{json.dumps(INFO)}'", False, [("ok", "engine 28.1")]),
        (f"echo '{json.dumps(INFO)}'", True, [("ok", "engine 28.1"), ("wrong", "no runtime for it")]),
        (
            f"echo '{json.dumps(INFO | {'Runtimes': {'nvidia': {}}})}'",
            True,
            [("ok", "engine 28.1"), ("ok", "containers can have the GPU")],
        ),
        (
            f"echo '{json.dumps({'ServerErrors': ['permission denied while trying to connect']})}'",
            False,
            [("wrong", "permission denied")],
        ),
        ("exec sleep 60", False, [("wrong", "no answer within 1 s")]),
    ],
)
def test_the_docker_engine_and_its_gpu_runtime(
    script: str, has_gpu: bool, expected: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "docker", script)
    if has_gpu:
        program(tmp_path, "nvidia-smi", "echo 'Fake GPU, 570.86.10, 81920'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = list(docker.check_docker(1))
    assert [finding.status for finding in found] == [status for status, _ in expected]
    for finding, (_, says) in zip(found, expected, strict=True):
        assert says in finding.says


def test_without_docker_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(docker.check_docker(1)).status == "note"


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="timeout_s=0"):
        DoctorConfig(timeout_s=0)
