"""Pages whose commands are executed, one after the other, in a reader's directory."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.documentation import ROOT, commands, words
from harness.reward_service import RewardService
from plaudit import cli
from plaudit.ranking_service.__main__ import main as plaudit_rank
from plaudit.rewards import RewardClient, RewardSettings

EXECUTED = [
    'plaudit generate runs/demo/ppo "This movie"',
    "plaudit demo --output-dir runs/again",
    "plaudit ppo --policy imdb-gpt2-mini --data movie-reviews --reward.function rewards:short",
    "plaudit-rank import answers.jsonl",
    "plaudit-rank invite Ada Bao",
    "plaudit-rank export rankings.jsonl",
    "plaudit-reward --model imdb-distilbert-mini --label POSITIVE",
    "curl -s localhost:8000/v1/rewards",
]
"""The beginnings of the commands that this file executes."""
ANSWERS = {
    "id": "t1",
    "group": "g1",
    "split": "train",
    "prompt": "This movie",
    "batch": "round-1",
    "answers": [
        {"id": "a1", "text": " was wonderful.", "policy": "sft", "revision": "r1", "seed": 0},
        {"id": "a2", "text": " was bad.", "policy": "sft", "revision": "r1", "seed": 1},
    ],
}


def of(page: str, program: str) -> list[list[str]]:
    """The commands of a page that begin with a program, as words."""
    return [words(c.text) for c in commands() if c.page == page and words(c.text)[:1] == [program]]


def test_the_ranking_services_five_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.jsonl").write_text(json.dumps(ANSWERS) + "\n")
    run = [c for c in of("docs/how-to/ranking.md", "plaudit-rank") if c[1] in ("import", "invite", "export")]
    assert [command[1] for command in run[:3]] == ["import", "invite", "export"]
    for command in run[:3]:
        assert plaudit_rank(command[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("/i/") == 2
    assert Path("rankings.jsonl").read_text() == ""


def test_the_reward_services_first_request() -> None:
    page = "docs/how-to/reward-service.md"
    (start,), (curl,) = of(page, "plaudit-reward")[:1], of(page, "curl")
    service = RewardService(start[start.index("--model") + 1], *start[start.index("--label") :])
    try:
        headers = {"content-type": curl[curl.index("-H") + 1].partition(": ")[2]}
        body = curl[curl.index("-d") + 1].encode()
        url = curl[2].replace("localhost:8000", f"127.0.0.1:{service.port}")
        with urllib.request.urlopen(urllib.request.Request(f"http://{url}", body, headers), timeout=30) as answer:
            rewards = json.load(answer)["rewards"]
    finally:
        service.kill()
    assert len(rewards) == 1
    assert rewards[0] > 1


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[str]:
    """The example's service on a free port."""
    source = (ROOT / "examples" / "own_service" / "service.py").read_text()
    assert "8000" in source
    program = source.replace(
        'ThreadingHTTPServer(("127.0.0.1", 8000), Service).serve_forever()',
        'server = ThreadingHTTPServer(("127.0.0.1", 0), Service)\n'
        "    print(server.server_port, flush=True)\n"
        "    server.serve_forever()",
    )
    path = tmp_path / "service.py"
    path.write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_reward_service_of_ones_own_gives_rewards_to_the_client(own_service: str) -> None:
    with RewardClient(RewardSettings.of(url=(own_service,), label="ING")) as client:
        client.connect()
        assert client.score(["p"] * 3, ["going home", "", "singing"]) == [0.5, 0.0, 1.0]


@pytest.mark.slow
def test_the_first_run_and_an_answer_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo` is `plaudit demo --output-dir runs/demo`; fewer steps and prompts here."""
    monkeypatch.chdir(tmp_path)
    assert cli.run(["demo", "--output-dir", "runs/demo", "--steps", "2", "--n-prompts", "16"]) == 0
    for name in ("report.html", "evaluation.json", "samples.csv", "ppo/metrics.jsonl", "ppo/adapter_model.safetensors"):
        assert Path("runs/demo", name).exists(), name
    capsys.readouterr()
    for _ in range(2):  # the second time there is nothing left to do
        (again, _again) = [c for c in of("docs/tutorial/first-run.md", "plaudit") if c[1] == "demo"]
        assert cli.run([*again[1:-1], "2", "--n-prompts", "16"]) == 0
    capsys.readouterr()
    (generate,) = [c for c in of("docs/tutorial/first-run.md", "plaudit") if c[1] == "generate"]
    assert cli.run(generate[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_reward_function_from_a_dry_run_to_a_trained_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("rewards.py").write_text(
        "def short(prompts, responses):\n    return [min(1.0, 10 / max(1, len(r.split()))) for r in responses]\n"
    )
    small = ["--steps", "1", "--ppo.batch-size", "8", "--ppo.mini-batch-size", "4", "--max-texts", "200"]
    ran = [c for c in of("docs/how-to/reward-function.md", "plaudit") if "imdb-gpt2-mini" in c]
    assert len(ran) == 2
    for command in ran:
        assert cli.run([*command[1:], *small]) == 0, capsys.readouterr().err
    assert Path("runs/short/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "step_by_step" / "step_by_step.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 36", "STEPS = 1").replace("BATCH = 128", "BATCH = 8")
        cell.source = cell.source.replace('data="movie-reviews"', 'data="movie-reviews", max_texts=400')
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "reward before" in str(notebook.cells)
