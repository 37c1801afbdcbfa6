"""The audit's figures by hand, and what they don't depend on."""

import pytest

from plaudit.report.audit import audit, correlation, distinct_share, repeated_share


def test_a_correlation_by_hand() -> None:
    # Deviations -1, 0, 1 and -1, 1, 0: sum of products 1, sums of squares 2 and 2.
    assert correlation([1, 2, 3], [4, 6, 5]) == pytest.approx(0.5)
    assert correlation([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    assert correlation([1, 2, 3], [7, 7, 7]) is None
    assert correlation([1], [2]) is None
    with pytest.raises(ValueError, match="2 and 1 values"):
        correlation([1, 2], [1])


def test_a_correlation_does_not_depend_on_scale_and_origin() -> None:
    x, y = [0.3, -1.2, 4.5, 2.0], [1.0, 0.0, 2.5, -3.0]
    assert correlation([10 * v - 7 for v in x], [v / 3 for v in y]) == pytest.approx(correlation(x, y))


def test_repeated_trigrams_by_hand() -> None:
    # a b a b a b: aba bab aba bab, of which two occurred before. Another text's n-grams don't count.
    assert repeated_share(["a b a b a b"]) == 0.5
    assert repeated_share(["a b c", "a b c"]) == 0
    assert repeated_share(["a b a b a b", "a  b\nc d"]) == pytest.approx(2 / 6)
    assert repeated_share(["a b", ""]) == 0
    assert repeated_share(["so so so"], n=1) == pytest.approx(2 / 3)


def test_the_distinct_share_ignores_white_space_at_the_ends() -> None:
    assert distinct_share([" good", "good\n", "bad", "good film"]) == 0.75


def test_the_audit_has_each_figure_and_leaves_out_what_is_not_defined() -> None:
    found = audit(
        ["x", "y", "z"],
        rewards=[1.0, 2.0, 3.0],
        lengths=[1, 3, 2],
        kls=[0.0, 10.0, 20.0],
        judged={"other": [3.0, 2.0, 1.0], "flat": [1.0, 1.0, 1.0]},
    )
    assert found == pytest.approx(
        {
            "repeated_trigrams": 0.0,
            "distinct_share": 1.0,
            "kl_p05": 1.0,
            "kl_p50": 10.0,
            "kl_p95": 19.0,
            "length_correlation": 0.5,
            "other/correlation": -1.0,
        }
    )
