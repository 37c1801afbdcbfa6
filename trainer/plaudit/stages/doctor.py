"""Look at the environment and print what was found, subject by subject."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

from plaudit.doctor.findings import Finding, wrong
from plaudit.errors import PlauditError
from plaudit.settings.doctor import DoctorConfig


class ProblemsFound(PlauditError):
    """The doctor found something wrong. The findings are printed."""


def run(config: DoctorConfig) -> list[Finding]:
    """Print every finding, and return them.

    Raises:
        ProblemsFound: at least one of them is a fault.
    """
    findings = []
    for subject, check in _checks(config):
        if subject in config.skip:
            continue
        try:
            found = list(check())
        except PlauditError as error:
            found = [wrong(subject, str(error), "correct what the message names")]
        findings += found
        if not config.json:
            for finding in found:
                print(finding.line(), flush=True)
    faults = sum(finding.status == "wrong" for finding in findings)
    if config.json:
        print(json.dumps({"ok": faults == 0, "findings": [asdict(finding) for finding in findings]}, indent=2))
    if faults:
        raise ProblemsFound(f"{faults} of {len(findings)} findings are wrong")
    return findings


def _checks(config: DoctorConfig) -> Iterable[tuple[str, Callable[[], Iterable[Finding]]]]:
    from plaudit.doctor import docker, gpu, hub, machine, network, python

    yield "python", python.check_python
    yield "extras", python.check_extras
    yield "gpu", lambda: gpu.check_gpu(config.timeout_s)
    yield "bitsandbytes", lambda: gpu.check_bitsandbytes(config.timeout_s)
    if config.run_torch:
        yield "gpu", gpu.check_by_running
    yield "notebook", python.check_notebook
    yield "hub", lambda: hub.check_hub(config.timeout_s)
    yield "machine", lambda: machine.check_machine(config.output_dir)
    if config.preset is not None:
        preset = config.preset
        yield "preset", lambda: machine.check_preset(preset, config.output_dir)
    yield "proxies", lambda: network.check_proxies(config.reward_url)
    if config.reward_url is not None:
        url = config.reward_url
        yield "reward", lambda: network.check_reward(url, config.label, config.revision, config.timeout_s)
    yield "docker", lambda: docker.check_docker(config.timeout_s)
