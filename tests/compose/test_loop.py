"""The profile `loop` on a real engine: `make compose-test`. Builds images, so it runs only when asked."""

import json
import os
import shutil
import time
from collections.abc import Iterator

import pytest
import yaml

from harness.machine.compose import CALLER, ROOT, Project, reason_to_skip
from harness.processes import free_port
from plaudit.run.loop_state import ROUNDS_FILE
from plaudit.stages.loop import REPORT_FILE

NAME = "compose-loop-test"
RUN = ROOT / "runs" / NAME
PRESET = ROOT / "runs" / f"{NAME}.yaml"
LOOP = ("--profile", "loop")
PROMPTS = 24
SKIP = reason_to_skip()
pytestmark = [pytest.mark.skipif(SKIP is not None, reason=str(SKIP)), pytest.mark.timeout(1800)]


@pytest.fixture
def stack() -> Iterator[Project]:
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    os.chown(RUN, CALLER, -1)
    settings = yaml.safe_load((ROOT / "presets" / "loop.yaml").read_text())
    settings |= {"steps": 2, "n_prompts": 8, "checkpoint_every": 1}
    settings["sample"]["n"] = PROMPTS
    settings["ppo"] |= {"batch_size": 16, "mini_batch_size": 16}
    settings["reward_model"] |= {"allow_chance": True, "held_out_fraction": 0.3}
    PRESET.write_text(yaml.safe_dump(settings))
    stack = Project(
        "plaudit-loop-test",
        {
            "LOOP_NAME": NAME,
            "LOOP_PRESET": f"runs/{PRESET.name}",
            "RANK_API_KEY": "the-key-of-the-ranking-service",
            "BALANCER_PORT": str(free_port()),
        },
    )
    try:
        stack.compose(*LOOP, "build", "loop", "loop-rank", "reward", "balancer")
        yield stack
    finally:
        print(stack.compose(*LOOP, "logs", "--no-color", "--tail=40"))
        stack.compose(*LOOP, "down", "--volumes", "--remove-orphans")
        PRESET.unlink()


def test_two_rounds_of_simulated_rankings_run_to_their_end_in_containers(stack: Project) -> None:
    began = time.monotonic()
    stack.compose(*LOOP, "up", "-d", "loop")
    assert stack.exit_code("loop") == 0
    records = [json.loads(line) for line in (RUN / ROUNDS_FILE).read_text().splitlines()]
    print(f"two rounds in {time.monotonic() - began:.0f} s; seconds of the stages:", *(r["seconds"] for r in records))
    assert [record["round"] for record in records] == [1, 2]
    assert all(record["rankings"] >= PROMPTS and record["people"] == 5 for record in records)
    assert records[0]["revision"] != records[1]["revision"]
    assert {by: set(rates) for by, rates in records[1]["win_rates"].items()} == {
        "reward_model": {"stage-1", "round-1"},
        "judge": {"stage-1", "round-1"},
    }
    assert (RUN / REPORT_FILE).stat().st_uid == CALLER
