"""Stage 3 over families that have something of their own: a whole run, and what plain transformers reads of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.ppo import policy_families
from plaudit import cli, errors

SMALL = 1e-5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with policy_families.running_stub() as address:
        yield address


@pytest.mark.parametrize(
    ("family", "samples", "adapted"),
    [
        ("gemma3_text", "with its cache", "q_proj, v_proj"),
        ("qwen3_moe", "with its cache", "k_proj, o_proj, q_proj, v_proj"),
        ("bamba", "without a cache", "down_proj, gate_proj, in_proj, k_proj and 4 more"),
    ],
)
def test_a_family_goes_through_the_whole_of_stage_3(
    family: str, samples: str, adapted: str, url: str, tmp_path: Path
) -> None:
    row = policy_families.row(family, tmp_path, url)
    name, *differences, _, sampling, layers, first_ratio, resumed, merged, whole = row.strip("| ").split(" | ")
    assert (name, sampling, layers, resumed) == (family, samples, adapted, "same bits")
    numbers = [float(cell) for cell in (*differences, first_ratio, merged, whole) if cell != "no"]
    assert len(numbers) == 7 - 2 * (family == "bamba")
    assert max(numbers) <= SMALL


def test_a_refusal_is_a_row_and_the_run_ends_with_2(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = policy_families.row("rwkv", tmp_path, url)
    assert row.startswith("| rwkv | refused: beside a longer text, a text has other log-probabilities than alone")
    assert row.count("|") == policy_families.HEADER[0].count("|")
    config = policy_families.tiny_run(tmp_path / "rwkv", url)
    flags = ["--policy", config.policy, "--output-dir", str(config.output_dir), "--lora.no-enabled"]
    code = cli.run(["ppo", *flags, "--data", str(config.dataset.data), "--reward.url", url])
    assert code == errors.EXIT_USAGE == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "RwkvForCausalLM) can't be trained here: beside a longer text" in said[-1]


def test_a_table_is_put_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "models.md"
    document.write_text("before\n<!-- judges -->\nold\n<!-- end of judges -->\nafter\n")
    tables.put(document, "judges", ["| new |"])
    assert document.read_text() == "before\n<!-- judges -->\n| new |\n<!-- end of judges -->\nafter\n"
    with pytest.raises(ValueError, match="<!-- policy families -->"):
        tables.put(document, "policy families", [])
