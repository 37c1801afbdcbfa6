"""The table of families says what the service does with each, a refusal included."""

from pathlib import Path

import pytest

from benchmarks.service import model_families


@pytest.mark.parametrize(("family", "batches"), [("bert", "packed"), ("opt", "padded"), ("xlnet", "by length")])
def test_a_row_has_the_way_of_batching_and_small_numbers(family: str, batches: str, tmp_path: Path) -> None:
    name, way, *numbers = model_families.judge_row(family, tmp_path).strip("| ").split(" | ")
    assert (name, way) == (family, batches)
    assert len(numbers) == 8
    assert all(0 <= float(number) < 1e-5 for number in numbers)


def test_a_family_that_the_service_refuses_is_in_the_table_with_the_reason(tmp_path: Path) -> None:
    row = model_families.judge_row("nystromformer", tmp_path)
    assert row.startswith("| nystromformer | refused | nystromformer loads but does not run on a text of 3 tokens")
    assert row.count("|") == model_families.HEADER[0].count("|")


def test_a_family_without_classifiers_is_one_line(tmp_path: Path) -> None:
    assert model_families.judge_row("lfm2", tmp_path).startswith(
        "| lfm2 | refused | lfm2 is of the family lfm2, of which"
    )
