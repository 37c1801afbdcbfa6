"""The seed recipe's two programs, run as they stand on the embedded models."""

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

from plaudit.policy.loading import load_policy

EXAMPLES = Path(__file__).parents[2] / "examples" / "imdb_sentiment"
PARAMETERS = "trainable params: 37,057 || all params: 2,183,041 || trainable%: 1.6975\n"
"""3 layers, each with an adapter of rank 16 on c_attn (192 to 576), and the value head: 3 * 16 * (192 + 576) + 193."""


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 reviews, of which every third is too short for the recipe."""
    words = ("terrible", "wonderful", "boring", "great")
    texts = [
        f"Film {i} is {words[i % 4]}. " + f"The acting is {words[i % 4]}. " * (12 if i % 3 else 2) for i in range(300)
    ]
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    pd.DataFrame({"text": texts, "label": [i % 2 for i in range(300)]}).to_csv(path, index=False)
    return path


def run(program: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> pd.DataFrame:
    path = EXAMPLES / program
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "2", "--batch-size", "8", *arguments])
    results: pd.DataFrame = runpy.run_path(str(path))["main"]()
    return results


@pytest.mark.parametrize("bits", [(), ("--load-in-8bit",)])
def test_the_classic_program_trains_and_compares_sixteen_samples(
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bits: tuple[str, ...],
) -> None:
    results = run(
        "classic.py",
        monkeypatch,
        "--data",
        str(reviews),
        "--output-dir",
        str(tmp_path),
        "--learning-rate",
        "0.01",
        *bits,
    )
    printed = capsys.readouterr().out
    assert PARAMETERS in printed
    assert len(results) == 16
    assert results["query"].map(len).between(1, 60).all()
    assert results[["reward (before)", "reward (after)"]].notna().all(axis=None)
    assert "mean:" in printed
    assert "median:" in printed
    saved = load_policy(tmp_path)
    assert max(float(p.detach().abs().max()) for name, p in saved.named_parameters() if "lora_B" in name) > 0


def test_the_idiomatic_program_trains_against_a_reward_service_and_compares(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("idiomatic.py", monkeypatch, "--data", str(reviews), "--output-dir", str(tmp_path))
    assert results.columns.tolist() == ["query", "response_before", "response_after", "reward_before", "reward_after"]
    assert len(results) == 16
    assert PARAMETERS in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert load_policy(tmp_path / "ppo").has_adapters
