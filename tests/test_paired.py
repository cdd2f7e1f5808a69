"""The statistics of studies: intervals, paired differences and tests, against SciPy and by hand."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import numpy as np
import pytest
from scipy import stats


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("paired")


def test_sign_flips_are_the_permutation_test(paired: Any) -> None:
    """Against SciPy's exact enumeration of all signs; differences of 0 say nothing."""
    values = np.array([0.5, 0.25, -0.25, 1.0, 0.75, 0.0, 0.5, -0.5, 0.25])
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert paired.sign_flip(values) == pytest.approx(exact, abs=0.02)  # 4 standard deviations of 10,000 resamples
    assert paired.sign_flip(np.zeros(5)) == 1.0 and paired.sign_flip(np.ones(30)) < 1e-3


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 9), (12, 1), (40, 60)])
def test_mcnemar_is_the_binomial_test(paired: Any, b: int, c: int) -> None:
    ours = np.array([1] * b + [0] * c + [1, 1, 0])
    theirs = np.array([0] * b + [1] * c + [1, 1, 0])
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert paired.mcnemar(ours, theirs) == pytest.approx(min(expected, 1.0), rel=1e-9)


def test_the_bootstrap_of_one_seed_is_the_normal_interval(paired: Any) -> None:
    """Of many questions the percentile bootstrap is p +- 1.96 sqrt(p (1 - p) / n)."""
    values = np.array([[1] * 600 + [0] * 1400])
    half = 1.959964 * np.sqrt(0.3 * 0.7 / 2000)
    found = paired.bootstrap(values)
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=2e-3)


def test_seeds_that_differ_widen_the_interval(paired: Any) -> None:
    """Two seeds, right on all questions and on none: a resample holds the first 0, 1 or 2 times."""
    found = paired.bootstrap(np.stack([np.ones(50), np.zeros(50)]))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_a_difference_is_paired(paired: Any) -> None:
    """The same verdicts differ nowhere, however hard the questions are; unpaired, they would."""
    verdicts = np.random.default_rng(0).integers(0, 2, (3, 40))
    same = paired.difference(verdicts, verdicts)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    one_more = verdicts.copy()
    one_more[:, verdicts[0].argmin()] = 1
    assert 0 < paired.difference(one_more, verdicts).value <= 1 / 40
    with pytest.raises(ValueError, match=r"\(3, 40\) and \(2, 40\)"):
        paired.difference(verdicts, verdicts[:2])


@pytest.mark.parametrize(("verdict", "low", "high"), [(0, 0.0, 0.0881), (1, 0.9119, 1.0)])
def test_all_verdicts_the_same(paired: Any, verdict: int, low: float, high: float) -> None:
    """Wilson's interval of 0 and of 40 of 40."""
    found = paired.accuracy(np.full((3, 40), verdict))
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (0.05, 0.03, 0.07, "better"),
        (-0.05, -0.07, -0.03, "worse"),
        (0.0, -0.015, 0.015, "as good"),
        (0.01, -0.01, 0.03, "open"),
        (0.015, 0.01, 0.019, "as good"),  # a difference, and smaller than what matters
        (0.05, -0.01, 0.11, "open"),
    ],
)
def test_what_an_interval_says(paired: Any, value: float, low: float, high: float, says: str) -> None:
    assert paired.as_good(paired.Interval(value, low, high), 0.02) == says


def test_differences_are_pooled_over_students(paired: Any) -> None:
    """Two machines with two and one common students, each arm at the rate that is best on validation questions."""
    pooled = importlib.import_module("pooled")
    run = lambda arm, seed, test, rate=1.0, validation=0.5: {
        "arm": arm, "seed": seed, "test": test, "rate": rate, "steps": 300, "validation": validation
    }  # fmt: skip
    first = [run(pooled.GHOSTS, 0, 0.9), run(pooled.GHOSTS, 1, 0.8), run(pooled.SFT, 0, 0.7), run(pooled.SFT, 1, 0.5)]
    first += [run(pooled.GHOSTS, seed, 1.0, rate=2.0, validation=0.4) for seed in (0, 1)]
    second = [run(pooled.GHOSTS, 0, 0.4), run(pooled.SFT, 0, 0.5), run(pooled.SFT, 1, 0.5)]
    values = pooled.differences([first, second], pooled.GHOSTS, pooled.SFT, 300)
    np.testing.assert_allclose(values, [0.2, 0.3, -0.1])
    found, known = pooled.t_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.value == pytest.approx(0.4 / 3)
    assert pooled.sign_test(np.array([1, 1, 1, 0])) == pytest.approx(0.25) and pooled.sign_test(np.zeros(3)) == 1.0


def test_the_pooled_table_is_that_of_the_page(paired: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/method.md has the output of the command that it names."""
    root = pathlib.Path(__file__).parents[1]
    page = (root / "docs" / "method.md").read_text(encoding="utf-8")
    (command,) = [line for line in page.splitlines() if line.startswith("python benchmarks/pooled.py --json ")]
    assert importlib.import_module("pooled").main(["--json", *(str(root / f) for f in command.split()[3:])]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line in page
