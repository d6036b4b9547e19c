"""Sweeps: the front, the searches on a ladder, and inverse answers against plain enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_model, resolve_gpus
from forerun.errors import InputError
from forerun.planner import Pins, search
from forerun.planner.candidates import OwnCost, Request, bound_all, may_fit
from forerun.planner.sweep import (
    Ask,
    Conditions,
    cheapest,
    fewest_gpus,
    largest_model,
    longest_context,
    pareto_front,
    sweep_table,
    why_none,
    with_prices,
)
from forerun.planner.sweep.fewest import cluster_sizes, sizes_below
from forerun.planner.sweep.inverse import largest, rounder_above, rounder_below, smallest
from forerun.workload import Workload

SIMPLE = Pins(pp=1, cp=1, tp=1, recompute="none", offload=0.0)
"""Few layouts: data parallelism alone."""


def ask_of(gpus: str = "8xH100", model: str = "tiny-25m", seq: int = 1024, seqs: int = 64) -> Ask:
    return Ask(
        model=load_model(model),
        cluster=resolve_gpus(gpus).cluster,
        workload=Workload(seq_tokens=seq, global_batch_seqs=seqs),
        pins=SIMPLE,
    )


def small_memory(ask: Ask, num_bytes: float) -> Ask:
    pool = ask.cluster.pools[0]
    device = msgspec.structs.replace(pool.device, memory_bytes=int(num_bytes))
    pool = msgspec.structs.replace(pool, device=device)
    return replace(ask, cluster=msgspec.structs.replace(ask.cluster, pools=(pool,)))


def best(ask: Ask) -> float | None:
    """Tokens per second of the best plan that surely fits, from the search itself."""
    request = Request(ask.model, ask.cluster, ask.workload, ask.pins, OwnCost())
    if not may_fit(bound_all(request)):
        return None
    result = search(ask.model, ask.cluster, ask.workload, ask.pins, keep=1)
    return result.plans[0].estimate.tokens_per_s if result.plans else None


numbers = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_front_is_that_of_brute_force(points: list[tuple[float, float]]) -> None:
    expected = {
        i
        for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
    }
    front = pareto_front(points)
    assert set(front) == expected and len(front) == len(expected)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


@given(st.integers(0, 300), st.integers(0, 300))
def test_ladder_searches_are_exact_when_monotone(last: int, edge: int) -> None:
    coarse = sorted({0, *(2**k for k in range(9) if 2**k <= last), last})
    asked: list[int] = []

    def at_least(rung: int) -> bool:
        asked.append(rung)
        return rung >= edge

    assert smallest(at_least, coarse) == (edge if edge <= last else None)
    assert len(asked) == len(set(asked)) <= 25
    assert largest(lambda rung: rung <= edge, coarse) == min(edge, last)
    assert largest(lambda rung: rung < edge, coarse) == (min(edge - 1, last) if edge else None)


@given(st.sets(st.integers(0, 40)), st.integers(1, 40))
@settings(max_examples=200)
def test_ladder_answers_hold_and_no_neighbour_improves(good: set[int], last: int) -> None:
    coarse = sorted({0, *(2**k for k in range(6) if 2**k <= last), last})
    found = smallest(good.__contains__, coarse)
    assert (found is None) == (not good & set(coarse))
    if found is not None:
        failed = max((c for c in coarse if c < min(good & set(coarse))), default=-1)
        assert found in good
        assert not good & {r for r in range(found - 3, found) if r > failed}
    found = largest(good.__contains__, coarse, neighbours=rounder_above)
    assert (found is None) == (0 not in good)
    if found is not None:
        assert found in good
        assert not good & {r for r in rounder_above(found) if r <= last}


def test_ladder_passes_over_what_is_not_usable() -> None:
    asked: list[int] = []

    def holds(rung: int) -> bool:
        asked.append(rung)
        return rung >= 9

    assert smallest(holds, [0, 8, 16], usable=lambda rung: rung % 2 == 0) == 10
    assert all(rung % 2 == 0 for rung in asked)


def test_rounder_numbers_are_multiples_on_their_side() -> None:
    for number in range(1, 70):
        assert rounder_above(number)[0] == number + 1
        assert all(number < r <= 2 * number or number == 1 for r in rounder_above(number))
        assert all(0 < r < number for r in rounder_below(number))


def test_a_table_has_the_plans_of_the_search() -> None:
    asks = [ask_of(gpus, seqs=n) for gpus in ("2xH100", "4xA100") for n in (32, 64)]
    result = sweep_table(asks, Conditions(fit="marginal", tokens=1e9))
    assert [row.gpus for row in result.rows] == ["2xH100", "2xH100", "4xA100", "4xA100"]
    for ask, row in zip(asks, result.rows, strict=True):
        found = search(ask.model, ask.cluster, ask.workload, ask.pins, keep=1, fit="marginal")
        plan = found.plans[0]
        assert (row.label, row.estimate) == (plan.label, plan.estimate)
        run_s = row.run_s(1e9)
        assert run_s is not None and run_s == pytest.approx(1e9 / plan.estimate.tokens_per_s)
    assert result.paid == "gpus" and result.pareto
    again = sweep_table(asks, Conditions(fit="marginal", tokens=1e9))
    assert msgspec.structs.replace(again, seconds=0.0) == msgspec.structs.replace(
        result, seconds=0.0
    )


def test_the_front_compares_rows_of_one_job_by_price_when_all_have_one() -> None:
    prices = {"H100-SXM-80GB": 3.0, "A100-SXM-80GB": 30.0}
    asks = [ask_of(gpus, seqs=n) for n in (32, 64) for gpus in ("2xH100", "2xA100-80GB")]
    asks = [replace(ask, cluster=with_prices(ask.cluster, prices)) for ask in asks]
    result = sweep_table(asks, Conditions())
    assert result.paid == "usd_per_hour"
    assert result.pareto == [0, 2]
    assert result.rows[0].price_usd_per_hour == 6.0
    row = result.rows[0]
    assert row.usd_per_billion_tokens == pytest.approx(6e9 / 3600 / row.tokens_per_s)


def test_an_infeasible_combination_is_a_row_and_a_sweep_of_refusals_is_an_error() -> None:
    tight = small_memory(ask_of(), 1e8)
    wrong = replace(ask_of(), pins=Pins(tp=3))
    result = sweep_table([tight, wrong, ask_of()], Conditions())
    assert [row.status for row in result.rows] == ["infeasible", "refused", "planned"]
    assert "GiB" in result.rows[0].reason and "tp=3" in result.rows[1].reason
    assert result.answered == [2] and result.pareto == [2]
    reason, change = why_none(sweep_table([tight], Conditions()).rows)
    assert "GiB" in reason and change
    with pytest.raises(InputError, match="tp=3"):
        sweep_table([wrong, wrong], Conditions())


def test_a_time_limit_leaves_rows_out_and_says_so() -> None:
    ticks = itertools.count()
    result = sweep_table(
        [ask_of()] * 3, Conditions(time_limit_s=3.5, clock=lambda: float(next(ticks)))
    )
    statuses = [row.status for row in result.rows]
    assert result.limit == "time" and statuses[-1] == "left out"
    late = sweep_table([ask_of()], Conditions(time_limit_s=0.5, clock=lambda: float(next(ticks))))
    assert [row.status for row in late.rows] == ["left out"]
    assert "--time-limit" in why_none(late.rows)[1]


@pytest.mark.parametrize("factor", [0.2, 0.9, 1.0])
def test_plans_fit_for_certain_unless_allowed_otherwise(factor: float) -> None:
    ask = ask_of("1xH100")
    peak = search(ask.model, ask.cluster, ask.workload, ask.pins, keep=1).plans[0]
    tight = small_memory(ask, factor * peak.estimate.peak_memory_bytes.median)
    row = sweep_table([tight], Conditions()).rows[0]
    if row.estimate is None:
        assert row.status == "infeasible" and factor < 0.5
    else:
        assert row.estimate.fits == "yes"
    perhaps = sweep_table([tight], Conditions(fit="marginal")).rows[0]
    if row.estimate is not None:
        assert perhaps.tokens_per_s >= row.tokens_per_s


@pytest.mark.parametrize("seqs", [64, 96])
def test_fewest_gpus_is_that_of_enumeration(seqs: int) -> None:
    ask = ask_of("8x4xH100", seqs=seqs)
    sizes = cluster_sizes(ask.cluster, 6)
    rates: list[float] = []
    for cluster in sizes:
        try:
            rates.append(best(replace(ask, cluster=cluster)) or 0.0)
        except InputError:
            rates.append(0.0)
    for needed in (1.0, rates[1] * 1.01, rates[3] * 0.99, max(rates)):
        expected = min((i for i, rate in enumerate(rates) if rate >= needed), default=None)
        result = fewest_gpus([ask], Conditions(), lambda _, n=needed: n, max_nodes=6)
        (answer,) = result.answers
        assert expected is not None and answer.row is not None
        assert result.rows[answer.row].num_devices == sizes[expected].num_devices
        assert len({row.gpus for row in result.rows}) == len(result.rows)
    (answer,) = fewest_gpus([ask], Conditions(), lambda _: 1e15, max_nodes=6).answers
    assert answer.row is None and "no size up to" in answer.text


def test_sizes_are_parts_of_a_node_then_nodes() -> None:
    sizes = cluster_sizes(resolve_gpus("16x8xH100").cluster, 20)
    assert [c.num_devices for c in sizes[:6]] == [1, 2, 4, 8, 16, 24]
    assert sizes[0].name == "1xH100-SXM-80GB" and sizes[4].name == "2x8xH100-SXM-80GB"
    names = [sizes[i].name for i in sizes_below(sizes, 18, 80)]  # 16 nodes; ten divide 80
    assert any(name.startswith("10x8x") for name in names)
    assert any(name.startswith("12x8x") for name in names)
    assert names[0].startswith("15x8x")
    with pytest.raises(InputError, match="this machine"):
        cluster_sizes(resolve_gpus("2xcpu").cluster, 4)


def test_longest_context_is_that_of_enumeration() -> None:
    whole = 24 * 1024
    ask = small_memory(ask_of("1xH100", seq=1, seqs=whole), 3.5e9)
    fitting: list[int] = []
    for steps in range(1, 25):
        length = 1024 * steps
        work = Workload(seq_tokens=length, global_batch_seqs=max(1, round(whole / length)))
        if best(replace(ask, workload=work)) is not None:
            fitting.append(length)
    result = longest_context([ask], Conditions())
    (answer,) = result.answers
    assert answer.row is not None and 1024 < max(fitting) < whole
    row = result.rows[answer.row]
    assert row.seq_tokens == max(fitting)
    assert abs(row.global_batch_tokens - whole) <= row.seq_tokens / 2
    assert result.wanted == "seq_tokens" and result.pareto == [answer.row]


def test_longest_context_ends_at_the_whole_batch() -> None:
    result = longest_context([ask_of("1xH100", seq=1, seqs=5000)], Conditions())
    assert result.answers[0].row is not None
    assert result.rows[result.answers[0].row].seq_tokens == 4096
    assert "raise --global-batch" in result.answers[0].text
    with pytest.raises(InputError, match="less than one sequence"):
        longest_context([ask_of(seq=1, seqs=1000)], Conditions())
    with pytest.raises(InputError, match="one length"):
        longest_context([ask_of(model="vit-b-16", seq=1, seqs=5000)], Conditions())


def test_largest_model_is_that_of_enumeration() -> None:
    ask = small_memory(ask_of("1xH100", seq=128, seqs=1), 2.6e9)
    result = largest_model([ask], Conditions())
    (answer,) = result.answers
    assert answer.row is not None
    row = result.rows[answer.row]
    found = int(row.model.removeprefix("standard-").removesuffix("m"))
    fitting = [n for n in range(20, 2 * found, 3) if best(replace(ask, model=load_model(f"{n}m")))]
    assert fitting and max(fitting) <= found


def test_cheapest_meets_the_deadline_for_the_least() -> None:
    prices = {"H100-SXM-80GB": 3.0, "A100-SXM-80GB": 1.0}
    gpus = ("1xA100-80GB", "2xH100", "8xH100")
    asks = [ask_of(name) for name in gpus]
    asks = [replace(ask, cluster=with_prices(ask.cluster, prices)) for ask in asks]
    conditions = Conditions(tokens=1e12)
    table = sweep_table(asks, conditions)
    runs = [(row.run_usd(1e12), row.run_s(1e12), i) for i, row in enumerate(table.rows)]
    for deadline_s in (None, *(run_s for _, run_s, _ in runs)):
        timely = [x for x in runs if deadline_s is None or (x[1] or 0) <= deadline_s]
        (answer,) = cheapest(asks, conditions, deadline_s=deadline_s).answers
        assert answer.row == min(timely)[2]
    (late,) = cheapest(asks, conditions, deadline_s=1.0).answers
    assert late.row is None and "deadline" in late.text
    with pytest.raises(InputError, match="no price"):
        cheapest([ask_of()], conditions)
    with pytest.raises(InputError, match="tokens"):
        cheapest(asks, Conditions())
