"""Other systems, as far as Linux can show them: what only Linux or x86 has is missing, and everything goes on."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir, tiny_gpt2_dir

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "services", ROOT / "trainer")))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


class OnAnotherSystem(RewardService):
    """The reward service as on macOS with an arm64 processor."""

    def begin(self, model: Path | None = None) -> None:
        self._before = [sys.executable, "-m", "harness.other_system", "plaudit.reward_service", "--threads", "1"]
        self.environment["PYTHONPATH"] = PYTHONPATH
        super().begin(model)

    def wait_until_ready(self) -> None:
        """The service first says which parts it does without."""
        self.does_without: list[str] = []
        event = self.next_event()
        while event["event"] == "fallback":
            self.does_without.append(event["missing"])
            event = self.next_event()
        assert event["event"] == "ready", event
        self.announced = event
        self.port = int(event["url"].rpartition(":")[2])


def rewards(url: str) -> list[float]:
    items = [{"prompt": "This movie", "response": " was wonderful."}, {"prompt": "A film", "response": " is bad"}]
    body = json.dumps({"items": items, "label": "POSITIVE"}).encode()
    request = urllib.request.Request(f"{url}/v1/rewards", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [float(reward) for reward in json.load(answer)["rewards"]]


@pytest.mark.slow
def test_the_reward_service_answers_the_same_without_what_only_linux_and_x86_have(tmp_path: Path) -> None:
    model = tiny_classifier_dir(tmp_path / "judge")
    here, there = RewardService(model), OnAnotherSystem(model)
    try:
        assert [part for part in ("mkldnn", "malloc_trim", "packet filter") if part in str(there.does_without)] == [
            *("mkldnn", "malloc_trim", "packet filter")
        ]
        assert rewards(there.url) == pytest.approx(rewards(here.url), abs=1e-5)
    finally:
        here.kill()
        there.kill()


@pytest.mark.slow
def test_a_run_of_ppo_needs_neither_proc_nor_glibc(tmp_path: Path) -> None:
    policy = tiny_gpt2_dir(tmp_path / "policy")
    (tmp_path / "texts.txt").write_text("".join(f"this film was number {i} of the best\n" for i in range(40)))
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    flags = ["ppo", "--policy", str(policy), "--data", "texts.txt", "--reward.function", "mine.py:score"]
    done = run("-m", "harness.other_system", "plaudit.cli", *flags, "--steps", "1", "--output-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (step,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(step)["memory/update_peak_mib"] > 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("script", ["trainer", "reward_service", "ranking_service"])
def test_windows_is_answered_with_wsl(script: str, tmp_path: Path) -> None:
    code = f"import sys; sys.platform = 'win32'; from plaudit import console; console.{script}()"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "it runs on Linux and macOS, and on Windows inside WSL 2: https://" in line
