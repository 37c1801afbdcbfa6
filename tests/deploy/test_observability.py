"""Prometheus and HAProxy with the deployment's own files, over a real service and a real run; on Debian:
`apt-get install prometheus haproxy`."""

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from harness.machine.balancer import balancer_file
from harness.machine.prometheus import Prometheus
from harness.processes import free_port, running, until
from harness.reward_service import RewardService, status_of_a_request
from harness.tiny_models import tiny_classifier_dir, tiny_gpt2_dir
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo

MISSING = [program for program in ("prometheus", "haproxy") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.timeout(900),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
WAIT_S = 60.0


def prometheus_file(directory: Path, ports: dict[str, int]) -> Path:
    """prometheus.yml with these addresses, and more often."""
    config = yaml.safe_load((DEPLOY / "observability" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    jobs = [
        {"job_name": job["job_name"], "static_configs": [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]}
        for job in config["scrape_configs"]
    ]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config | {"scrape_configs": jobs}))
    return path


def test_every_query_of_the_dashboard_gives_data(tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.csv"
    reviews.write_text(
        "text\n" + "".join(f"Film {i} is wonderful. {'The acting is moving. ' * 12}\n" for i in range(60))
    )
    service = RewardService(tiny_classifier_dir(tmp_path / "judge"))
    balancer, operations, exporter, prometheus = (free_port() for _ in range(4))
    ports = {"reward": service.port, "balancer": operations, "trainer": exporter}
    config = PPOConfig(
        policy=str(tiny_gpt2_dir(tmp_path / "policy")),
        output_dir=tmp_path / "runs" / "run",
        dataset=DataSettings(str(reviews)),
        reward=RewardSettings.of(url=(f"http://127.0.0.1:{balancer}",), label="POSITIVE", patience_s=WAIT_S),
        ppo=PPOHyperparameters(batch_size=4, mini_batch_size=4, ppo_epochs=1),
        steps=1,
    )
    api = Prometheus(f"http://127.0.0.1:{prometheus}")
    with ExitStack() as stack:
        stack.callback(service.kill)
        haproxy = balancer_file(tmp_path, balancer, operations, [service.port])
        stack.enter_context(running("haproxy", "-db", "-f", str(haproxy), log=tmp_path / "haproxy.log"))
        export = [sys.executable, str(DEPLOY / "observability" / "exporter.py"), str(tmp_path / "runs"), str(exporter)]
        stack.enter_context(running(*export, log=tmp_path / "exporter.log"))
        flags = [f"--config.file={prometheus_file(tmp_path, ports)}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        listen = f"--web.listen-address=127.0.0.1:{prometheus}"
        stack.enter_context(running("prometheus", *flags, listen, log=tmp_path / "prometheus.log"))

        ppo.run(config)
        assert status_of_a_request(balancer, "no such label") == 422

        def shown() -> bool:
            assert status_of_a_request(balancer) == 200
            try:
                return not api.without_data()
            except ConnectionError:
                return False

        until(shown, "data for every query of the dashboard")
        assert api.jobs_up() == ["balancer", "reward", "trainer"]
