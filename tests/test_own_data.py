"""The README's recipe for one's own data, command by command, on 400 short reviews with stars."""

import json
import re
import shlex
from pathlib import Path

import pytest

from harness.own_reviews import write_reviews
from plaudit import cli
from plaudit.run.service_process import reward_service

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with the file, as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "my_reviews.csv")
    return tmp_path


def recipe() -> list[list[str]]:
    """The commands of the README's section, in order, split as a shell does."""
    text = README.read_text(encoding="utf-8")
    block = re.search(r"All stages on your own data.*?```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [shlex.split(line.removesuffix("&")) for line in block[1].replace("\\\n", " ").strip().splitlines()]


@pytest.mark.slow
def test_the_recipe_for_ones_own_data_works_at_the_first_try(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = {"gpt2": "imdb-gpt2-mini", "distilbert-base-uncased": "imdb-distilbert-mini"}
    sft, judge, serve, *rest = ([embedded.get(word, word) for word in command] for command in recipe())
    assert [command[1] for command in (sft, judge, *rest)] == ["sft", "reward-model", "ppo", "evaluate", "generate"]

    def told(command: list[str], *more: str) -> str:
        code = cli.run([*command[1:], *more])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out + said.err

    assert "optimizer.learning_rate=0.001, optimizer.epochs=3" in told(sft)
    said = told(judge)
    assert "label 5 is POSITIVE: 103 rows" in said
    assert "label 3 is left out: 45 rows" in said
    assert serve == ["plaudit-reward", "--model", "runs/judge", "--label", "POSITIVE", "--port", "8000"]
    with reward_service("runs/judge", directory, ready_timeout_s=120, flags=("--label", "POSITIVE")) as url:
        ppo, evaluate, generate = ([url if word.startswith("http") else word for word in command] for command in rest)
        said = told(ppo, "--steps", "6")
        assert "ppo.learning_rate=0.0025, ppo.batch_size=128, ppo.mini_batch_size=128, ppo.init_kl_coef=0.05" in said
        assert "held-out prompts, fewer than n_prompts=1024" in told(evaluate)
        steps = [json.loads(line) for line in Path("runs/ppo/metrics.jsonl").read_text().splitlines()]
        assert steps[-1]["objective/kl"] > 0.05  # something has visibly moved
        assert told(generate).strip()
