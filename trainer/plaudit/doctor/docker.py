"""The Docker engine, and whether its containers can have a GPU."""

import json
import shutil
from collections.abc import Iterator

from plaudit.doctor.findings import Finding, note, ok, output_of, wrong
from plaudit.doctor.gpu import driver_of


def check_docker(timeout_s: float) -> Iterator[Finding]:
    """The engine behind the `docker` command. Only the Compose files need it."""
    if shutil.which("docker") is None:
        yield note("docker", "not installed; only the Compose files need it", "https://docs.docker.com/engine/install/")
        return
    worked, answer = output_of(("docker", "info", "--format", "{{json .}}"), timeout_s)
    try:
        info = json.loads(answer) if worked else {}
        problems = info.get("ServerErrors") or ([] if worked else [answer])
    except ValueError:
        problems, info = [f"its answer can't be read: {answer.strip():.60}"], {}
    if problems:
        yield wrong(
            "docker",
            f"the engine does not answer: {problems[0]}",
            "sudo systemctl start docker; if that is refused: sudo usermod -aG docker $USER, and log in again",
        )
        return
    yield ok("docker", f"engine {info.get('ServerVersion', 'of unknown version')}")
    if isinstance(driver_of(timeout_s), str):
        return
    devices = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or []]
    if "nvidia" in (info.get("Runtimes") or {}) or any("nvidia" in device for device in devices):
        yield ok("docker", "containers can have the GPU")
    else:
        yield wrong(
            "docker",
            "there is a GPU, and the engine has no runtime for it",
            "install nvidia-container-toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && "
            "sudo systemctl restart docker",
        )
