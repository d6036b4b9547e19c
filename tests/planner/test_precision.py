"""Precision per operator group: equal to brute force and to HiGHS, and AdaPT's word lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner.precision import (
    Limits,
    Option,
    Weights,
    allowed,
    by_group,
    divergence,
    fixed_point_options,
    push_down,
    push_up,
    quantise,
    solve_precision,
    total,
)
from forerun.planner.precision.fixed_point import Strategy, Word, best_fraction
from forerun.planner.precision.problem import TOLERANCE, violations

STYLES = ("whole", "real", "bits", "correlated", "alike")


def instance(rng: np.random.Generator, num_groups: int, width: int, style: str) -> list[Option]:
    """Random options; `alike` gives every group the same ones, so that all sums tie."""
    options: list[Option] = []
    for group in range(num_groups):
        size, sensitivity = rng.lognormal(), rng.lognormal()
        for index in range(width):
            time, memory, error = rng.random(3)
            if style == "whole":
                time, memory, error = rng.integers(0, 8, 3)
            elif style == "bits":
                bits = 32 / (index + 1)
                time, memory = size * bits / 32, round(1e6 * size * bits / 8)
                error = sensitivity * size * 4**-bits
            elif style == "correlated":
                time = size * (1 - error) + 0.1 * time
            elif style == "alike":
                time, memory, error = 4 / (index + 1), 3 / (index + 2), 0.001 * 3**index - 0.001
            options.append(
                Option(
                    group=f"g{group}",
                    name=f"o{index}",
                    time_s=float(time),
                    memory_bytes=float(memory),
                    error=float(error),
                )
            )
    return options


def between(options: Sequence[Option], field: str, share: float) -> float:
    """A limit `share` of the way from the least to the largest sum of a field."""
    groups = by_group(options).values()
    least = sum(min(getattr(o, field) for o in group) for group in groups)
    most = sum(max(getattr(o, field) for o in group) for group in groups)
    return float(least + share * (most - least))


def best_by_force(options: Sequence[Option], limits: Limits, weights: Weights) -> float | None:
    best = None
    for chosen in itertools.product(*by_group(options).values()):
        memory = sum(o.memory_bytes for o in chosen)
        most = math.inf if limits.memory_bytes is None else limits.memory_bytes
        slack = 1 + TOLERANCE
        if sum(o.error for o in chosen) <= limits.error * slack and memory <= most * slack:
            cost = sum(weights.cost(o) for o in chosen)
            best = cost if best is None else min(best, cost)
    return best


def best_by_highs(options: Sequence[Option], limits: Limits, weights: Weights) -> float:
    """The same problem as a mixed-integer programme."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = list(by_group(options))
    choose = np.array([[o.group == name for o in options] for name in names], dtype=float)
    rows = [LinearConstraint(choose, 1, 1)]
    errors = np.array([o.error for o in options])
    rows.append(LinearConstraint(errors / limits.error, ub=1))
    if limits.memory_bytes is not None:
        memory = np.array([o.memory_bytes for o in options])
        rows.append(LinearConstraint(memory / limits.memory_bytes, ub=1))
    costs = np.array([weights.cost(o) for o in options])
    found = milp(costs, constraints=rows, integrality=np.ones(len(options)), bounds=Bounds(0, 1),
                 options={"mip_rel_gap": 0.0})  # fmt: skip
    assert found.success, found.message
    return float(found.fun)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("with_memory", [False, True])
def test_equals_brute_force(style: str, with_memory: bool) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        options = instance(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)), style)
        limits = Limits(
            error=between(options, "error", 1.1 * rng.random()),
            memory_bytes=between(options, "memory_bytes", rng.random()) if with_memory else None,
        )
        weights = Weights(time=1.0, memory=(0.0, 0.5)[seed % 2])
        best = best_by_force(options, limits, weights)
        if best is None:
            with pytest.raises(NoFeasiblePlan):
                solve_precision(options, limits, weights)
            continue
        found = solve_precision(options, limits, weights)
        assert found.objective == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert found.optimal and found.gap == 0 and found.limit is None
        assert found.lower_bound == found.objective
        assert violations(found.totals, limits) == ()
        assert found.totals == total(by_group(options), found.choice)


@pytest.mark.parametrize("style", ["real", "correlated", "bits"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_equals_highs(style: str, with_memory: bool) -> None:
    rng = np.random.default_rng(3)
    options = instance(rng, 25, 5, style)
    limits = Limits(
        error=between(options, "error", 0.2),
        memory_bytes=between(options, "memory_bytes", 0.4) if with_memory else None,
    )
    found = solve_precision(options, limits)
    assert found.objective == pytest.approx(best_by_highs(options, limits, Weights()), rel=1e-6)
    assert found.optimal


@pytest.mark.parametrize("style", STYLES)
def test_hundreds_of_groups_are_proven_with_one_limit(style: str) -> None:
    options = instance(np.random.default_rng(5), 500, 6, style)
    found = solve_precision(options, Limits(error=between(options, "error", 0.1)))
    assert found.optimal and found.limit is None


@pytest.mark.parametrize("style", STYLES)
def test_two_limits_end_within_a_thousandth(style: str) -> None:
    options = instance(np.random.default_rng(5), 500, 6, style)
    limits = Limits(
        error=between(options, "error", 0.1),
        memory_bytes=between(options, "memory_bytes", 0.4),
    )
    found = solve_precision(options, limits)
    assert found.gap is not None and found.gap <= 1e-3


def test_little_effort_gives_a_choice_and_an_honest_bound() -> None:
    options = instance(np.random.default_rng(7), 120, 5, "correlated")
    limits = Limits(
        error=between(options, "error", 0.3), memory_bytes=between(options, "memory_bytes", 0.4)
    )
    best = solve_precision(options, limits)
    hasty = solve_precision(options, limits, effort=0)
    late = solve_precision(options, limits, out_of_time=lambda: True)
    assert best.optimal
    for found, limit in ((hasty, "effort"), (late, "time")):
        assert found.limit == limit and not found.optimal
        assert found.lower_bound <= best.objective <= found.objective
        assert violations(found.totals, limits) == ()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(STYLES), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_never_costs_more(seed: int, style: str, share: float, more: float) -> None:
    options = instance(np.random.default_rng(seed), 12, 4, style)
    tight = between(options, "error", share)
    first = solve_precision(options, Limits(error=tight * (1 + TOLERANCE)))
    second = solve_precision(options, Limits(error=(tight + more) * (1 + TOLERANCE)))
    assert second.objective <= first.objective * (1 + TOLERANCE)


def test_the_same_input_gives_the_same_choice_in_any_order_of_groups() -> None:
    options = instance(np.random.default_rng(11), 30, 4, "real")
    limits = Limits(error=between(options, "error", 0.3))
    once = solve_precision(options, limits)
    assert once == solve_precision(options, limits)
    turned = [o for group in reversed(by_group(options).values()) for o in group]
    assert solve_precision(turned, limits).choice == once.choice


def test_decimal_errors_that_fill_the_budget_exactly_are_within_it() -> None:
    options = [
        Option(group=f"g{g}", name=name, time_s=time, memory_bytes=0, error=error)
        for g in range(3)
        for name, time, error in (("exact", 2.0, 0.0), ("fast", 1.0, 0.1))
    ]
    found = solve_precision(options, Limits(error=0.3))  # 3 x 0.1 > 0.3 in binary
    assert set(found.choice.values()) == {"fast"}


def test_a_zero_budget_takes_exact_options_only() -> None:
    options = instance(np.random.default_rng(2), 10, 4, "alike")
    assert set(solve_precision(options, Limits(error=0)).choice.values()) == {"o0"}


def test_a_budget_below_the_least_error_names_it() -> None:
    options = [Option(group="a", name="x", time_s=1, memory_bytes=8, error=0.25)]
    with pytest.raises(NoFeasiblePlan, match=r"0\.25, the least error .* --error-budget to 0\.25"):
        solve_precision(options, Limits(error=0.2))
    with pytest.raises(NoFeasiblePlan, match="least bytes of all groups together"):
        solve_precision(options, Limits(error=1, memory_bytes=7))


def test_two_limits_that_exclude_each_other_name_the_least_error_within_the_memory() -> None:
    options = [
        Option(group="a", name="exact", time_s=1, memory_bytes=8, error=0),
        Option(group="a", name="small", time_s=1, memory_bytes=1, error=3),
    ]
    with pytest.raises(NoFeasiblePlan, match="within 4 bytes the least error is 3"):
        solve_precision(options, Limits(error=2, memory_bytes=4))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["time_s", "memory_bytes", "error"])
def test_numbers_that_cannot_be_meant_are_refused(field: str, value: float) -> None:
    good = Option(group="a", name="x", time_s=1.0, memory_bytes=1.0, error=0.0)
    with pytest.raises(InputError, match=f"{field}={value}: .*group a, option x"):
        solve_precision([replace(good, **{field: value})], Limits(error=1))


def test_options_are_kept_by_evidence_class() -> None:
    exact = Option(group="a", name="x", time_s=2, memory_bytes=1, error=0, quality="exact")
    risky = Option(group="a", name="y", time_s=1, memory_bytes=1, error=0, quality="unquantified")
    assert allowed([exact, risky], ("exact",)) == (exact,)
    with pytest.raises(InputError, match="group a has no option"):
        allowed([risky], ("exact",))


def test_push_down_keeps_the_histogram_and_no_shorter_word_does() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.02, 1.0, 40.0):
        values = scale * rng.standard_normal(4000)
        word = push_down(values, bins=50)
        assert word.kl == 0
        assert divergence(values, quantise(values, word.word_length, word.fraction_length), 50) == 0
        assert 0 <= word.fraction_length < word.word_length <= 32
        for fraction in range(word.fraction_length):
            assert divergence(values, quantise(values, 32, fraction), 50) > 0
        loose = push_down(values, bins=50, largest_kl=0.01)
        assert loose.kl <= 0.01
        assert loose.word_length <= word.word_length


def test_values_that_are_codes_need_their_own_word() -> None:
    codes = np.arange(-8, 8) / 4  # 4 bits, 2 of them fractional
    assert push_down(codes, bins=64) == Word(word_length=4, fraction_length=2, kl=0.0)
    assert best_fraction(codes, 4).fraction_length == 2
    np.testing.assert_array_equal(quantise(codes, 4, 2), codes)


def test_quantising_rounds_to_the_nearest_code() -> None:
    values = np.random.default_rng(1).uniform(-1.9, 1.9, 1000)
    error = np.abs(quantise(values, 8, 6) - values)
    assert error.max() <= 2**-7


@pytest.mark.parametrize(
    ("diversity", "strategy", "expected"),
    [
        (2.0, "min", (9, 5)),  # ln 2 < 1: one bit more
        (math.e**2, "min", (9, 5)),  # d = 1: s1 = 1, s2 = 28
        (math.e**2, "mean", (23, 19)),  # 4 + ceil(29 / 2), and a word one longer, 4 bits ahead
        (math.e**2, "max", (32, 28)),
    ],
)
def test_push_up_follows_the_table(
    diversity: float, strategy: Strategy, expected: tuple[int, int]
) -> None:
    word = push_up(Word(word_length=8, fraction_length=4, kl=0.0), diversity, strategy)
    assert (word.word_length, word.fraction_length) == expected


def test_longer_words_err_less_and_cost_more() -> None:
    layers = {"conv": np.random.default_rng(0).standard_normal(2000) * 0.05}
    options = fixed_point_options(layers, {"conv": 3.2})
    errors = [o.error for o in options]
    assert len(options) == 29 and options[-1].time_s == 3.2
    assert errors[0] > 1e3 * errors[10] and errors[-1] <= errors[0]
    assert all(b <= a for a, b in itertools.pairwise(errors[:20]))
    assert [o.memory_bytes for o in options[:2]] == [1000.0, 1250.0]


def test_word_lengths_are_chosen_where_they_matter() -> None:
    rng = np.random.default_rng(0)
    layers = {"plain": rng.uniform(-1, 1, 3000), "spiky": rng.standard_cauchy(3000)}
    options = fixed_point_options(layers, {"plain": 1.0, "spiky": 1.0})
    found = solve_precision(options, Limits(error=1e-3))
    length = {group: int(name.split(".")[0]) for group, name in found.choice.items()}
    assert found.optimal and max(length.values()) < 16
    with pytest.raises(InputError, match="not finite"):
        fixed_point_options({"bad": np.array([np.nan])}, {"bad": 1.0})
