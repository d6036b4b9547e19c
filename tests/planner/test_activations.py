"""The choice per saved tensor: equal to brute force, never above a bound, checked apart."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner.activations import (
    LayerType,
    Limits,
    Maker,
    Problem,
    SavedTensor,
    bound,
    frontier,
    least_bytes,
    policies,
    solve,
    token_fraction,
    violations,
)
from forerun.planner.activations.policies import undominated


def random_layer(rng: random.Random, name: str = "layer", size: int = 5) -> LayerType:
    """A random chain with skips: some tensors unneeded, some compressible, some of one maker."""
    tensors = [SavedTensor(name="x", bytes=rng.randint(1, 9))]
    makers: list[Maker] = []
    while len(tensors) < size:
        before = [t.name for t in tensors]
        outputs: list[str] = []
        for _ in range(rng.choice((1, 1, 2))):
            num_bytes = rng.randint(1, 20)
            small = num_bytes / 2 if rng.random() < 0.5 else None
            tensors.append(
                SavedTensor(
                    name=f"t{len(tensors)}", bytes=num_bytes, needed=rng.random() < 0.75,
                    compressed_bytes=small, compress_s=rng.randint(0, 3) / 8,
                    decompress_s=rng.randint(0, 3) / 8,
                )
            )  # fmt: skip
            outputs.append(tensors[-1].name)
        inputs = rng.sample(before, min(len(before), rng.randint(1, 2)))
        makers.append(
            Maker(name=f"op{len(makers)}", inputs=tuple(inputs), outputs=tuple(outputs),
                  seconds=rng.randint(0, 12) / 4, repeatable=rng.random() < 0.9)
        )  # fmt: skip
    return LayerType(
        name=name, count=rng.randint(1, 3), tensors=tuple(tensors), makers=tuple(makers),
        forward_s=rng.randint(0, 6) / 2, backward_s=rng.randint(0, 10) / 2,
    )  # fmt: skip


def brute_policies(layer: LayerType, compress: bool) -> list[tuple[float, float, float]]:
    """(stored bytes, forward, backward seconds) of every way of storing tensors that works."""
    made_by = {name: maker for maker in layer.makers for name in maker.outputs}
    found: set[tuple[float, float, float]] = set()
    forms = [
        (0, 1, 2) if compress and tensor.compressed_bytes is not None else (0, 1)
        for tensor in layer.tensors
    ]
    for chosen in product(*forms):
        stored = {t.name for t, form in zip(layer.tensors, chosen, strict=True) if form}
        runs: set[str] = set()
        wanted = [t.name for t in layer.tensors if t.needed]
        works = True
        while wanted and works:
            name = wanted.pop()
            if name in stored:
                continue
            maker = made_by.get(name)
            works = maker is not None and maker.repeatable
            if maker is not None and maker.name not in runs:
                runs.add(maker.name)
                wanted += maker.inputs
        if not works:
            continue
        size = there = back = 0.0
        for tensor, form in zip(layer.tensors, chosen, strict=True):
            if form == 1:
                size += tensor.bytes
            elif form == 2:
                size += tensor.compressed_bytes or 0.0
                there, back = there + tensor.compress_s, back + tensor.decompress_s
        back += sum(maker.seconds for maker in layer.makers if maker.name in runs)
        found.add((size, there, back))
    return sorted(found)


def brute_best(problem: Problem) -> float:
    """The least seconds over all mixtures, with copies by a linear programme for each."""
    from scipy.optimize import linprog

    limits, live = problem.limits, problem.limits.live_micro_batches
    choices = []
    for layer in problem.layers:
        own = brute_policies(layer, limits.compress)
        own = [own[i] for i in undominated(np.array(own))]
        choices.append(list(combinations_with_replacement(own, layer.count)))
    best = float("inf")
    for mixture in product(*choices):
        rows = [(p, layer) for ps, layer in zip(mixture, problem.layers, strict=True) for p in ps]
        size = np.array([p[0] for p, _ in rows])
        lacking = size.sum() - limits.device_bytes / live
        fixed = sum(p[1] + p[2] for p, _ in rows)
        if lacking <= 1e-9:
            best = min(best, fixed)
            continue
        if not limits.offload or fixed >= best or lacking > limits.host_bytes / live + 1e-9:
            continue
        n, rate = len(rows), limits.copy_bytes_per_s
        eye = np.eye(n)
        matrix = np.vstack((
            np.hstack((-np.ones((1, n)), np.zeros((1, 2 * n)))),
            np.hstack((eye / rate, -eye, 0 * eye)),
            np.hstack((eye / rate, 0 * eye, -eye)),
        ))  # fmt: skip
        most = [-lacking, *(w.forward_s for _, w in rows), *(w.backward_s for _, w in rows)]
        least = [(0, s) for s in size] + [(p[1], None) for p, _ in rows]
        least += [(p[2], None) for p, _ in rows]
        answer = linprog(np.r_[np.zeros(n), np.ones(2 * n)], A_ub=matrix, b_ub=most, bounds=least)
        if answer.status == 0:
            best = min(best, answer.fun)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_the_frontier_of_a_layer_is_that_of_all_subsets(seed: int) -> None:
    layer = random_layer(random.Random(seed), size=7)
    for compress in (False, True):
        limits = Limits(device_bytes=1, compress=compress, copy_bytes_per_s=1.0)
        every = np.array(brute_policies(layer, compress))
        wanted = every[undominated(every)]
        found = policies(layer, limits)
        got = np.stack((found.stored_bytes, found.forward_s, found.backward_s), axis=1)
        np.testing.assert_allclose(np.sort(got, axis=0), np.sort(wanted, axis=0))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_undominated_rows_are_those_of_the_definition(columns: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        points = rng.integers(0, 6, (30, columns)).astype(float)
        kept = [
            i for i, p in enumerate(points)
            if not any(
                np.all(q <= p) and (np.any(q < p) or j < i) for j, q in enumerate(points) if j != i
            )
        ]  # fmt: skip
        assert undominated(points).tolist() == kept


def random_problem(seed: int) -> Problem:
    rng = random.Random(seed)
    kinds = rng.choice((1, 1, 2))
    layers = tuple(random_layer(rng, f"type {i}", 4) for i in range(kinds))
    layers = tuple(replace(layer, count=min(layer.count, 4 - kinds)) for layer in layers)
    layers = (layers[0], *(replace(layer, count=1) for layer in layers[1:]))
    limits = Limits(
        device_bytes=1.0, live_micro_batches=rng.randint(1, 3), compress=rng.random() < 0.4,
        copy_bytes_per_s=rng.choice((0.0, 2.0, 8.0)),
    )  # fmt: skip
    problem = Problem(layers=layers, limits=limits)
    keep = problem.keep_all_bytes
    host = rng.choice((float("inf"), round(rng.random() * keep)))
    limits = replace(limits, host_bytes=host, device_bytes=round(rng.random() * keep))
    return Problem(layers=layers, limits=limits)


@pytest.mark.parametrize("seed", range(80))
def test_no_choice_is_better(seed: int) -> None:
    problem = random_problem(seed)
    wanted = brute_best(problem)
    if wanted == float("inf"):
        with pytest.raises(NoFeasiblePlan):
            solve(problem)
        return
    found = solve(problem, gap=0.0)
    assert found.extra_s == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found.gap == pytest.approx(0.0, abs=1e-6)
    assert found.relaxed_s <= wanted * (1 + 1e-7) + 1e-9
    assert violations(problem, found) == []
    near = solve(problem)
    assert near.extra_s <= wanted * (1 + 1.1e-3) + 1e-9
    assert near.lower_bound_s <= wanted * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_the_hull_of_one_layer_bounds_every_mixture(seed: int) -> None:
    problem = random_problem(seed)
    layer = replace(problem.layers[0], count=3)
    limits = replace(problem.limits, host_bytes=float("inf"))
    single = Problem(layers=(layer,), limits=limits)
    if least_bytes(single) > limits.device_bytes:
        return
    found = solve(single, gap=0.0)
    per_layer = limits.device_bytes / limits.live_micro_batches / 3
    assert 3 * frontier(layer, limits).bound_s(np.array([per_layer]))[0] <= found.extra_s + 1e-9
    assert bound(single) <= found.extra_s + 1e-9


def test_more_room_never_costs() -> None:
    problem = random_problem(5)
    keep, last = problem.keep_all_bytes, float("inf")
    for part in (0.4, 0.6, 0.8, 1.0):
        limits = replace(problem.limits, device_bytes=part * keep, copy_bytes_per_s=4.0)
        found = solve(replace(problem, limits=limits), gap=0.0)
        assert found.extra_s <= last + 1e-9
        last = found.extra_s
    assert last == 0.0 and found.policies[0].runs_again == ()


def chain(
    others_s: float = 1.0, bandwidth: float = 9.0, layers: int = 100, device: float = 0.0
) -> Problem:
    """MEMO's block of 16 units: layer input, attention output, and fourteen units of others."""
    tensors = (
        SavedTensor(name="x", bytes=1.0),
        SavedTensor(name="attention", bytes=1.0),
        SavedTensor(name="others", bytes=14.0),
    )
    makers = (
        Maker(name="core", inputs=("x",), outputs=("attention",), seconds=50.0),
        Maker(name="rest", inputs=("x", "attention"), outputs=("others",), seconds=others_s),
    )
    layer = LayerType(
        name="block", count=layers, tensors=tensors, makers=makers, forward_s=1.0, backward_s=2.0
    )
    return Problem(layers=(layer,), limits=Limits(device_bytes=device, copy_bytes_per_s=bandwidth))


def test_token_wise_fraction_of_memo_is_the_relaxation() -> None:
    """alpha = 1/2: 2 + 14 alpha units in one second at 9 units per second."""
    alpha = token_fraction(2.0, 14.0, window_s=1.0, copy_bytes_per_s=9.0)
    assert alpha == pytest.approx(0.5)
    problem = chain(others_s=1.0)
    assert bound(problem) == pytest.approx(100 * (1 - alpha) * 1.0)
    found = solve(problem, gap=0.0)
    assert found.extra_s >= bound(problem) - 1e-9
    for use in found.policies:
        kinds = {t.name: t.choice for t in use.tensors}
        assert kinds["x"] == kinds["attention"] == "offload"  # never made again: the core is dear


def test_a_fast_link_moves_everything_and_costs_nothing() -> None:
    found = solve(chain(bandwidth=16.0))
    assert found.extra_s == 0.0 and found.host_bytes == pytest.approx(1600.0)


def test_memo_host_limit_at_a_million_tokens() -> None:
    """7B on 8 GPUs, 1024K tokens, 2 TB: alpha = (2e12 / 8 / 30 - 2.15e9) / 15.0e9 = 0.41."""
    unit = 2**20 * 4096 * 2 / 8
    alpha = token_fraction(2 * unit, 14 * unit, window_s=1e3, copy_bytes_per_s=1e12,
                           swapped_layers=30, host_bytes=2e12 / 8)  # fmt: skip
    assert alpha == pytest.approx(0.41, abs=0.01)


def test_host_memory_binds_as_in_the_closed_form() -> None:
    problem = chain(bandwidth=1e3, layers=50)
    problem = replace(problem, limits=replace(problem.limits, host_bytes=450.0))
    alpha = token_fraction(2.0, 14.0, window_s=1.0, copy_bytes_per_s=1e3, swapped_layers=50,
                           host_bytes=450.0)  # fmt: skip
    assert bound(problem) == pytest.approx(50 * (1 - alpha))
    found = solve(problem, gap=0.0)
    assert found.host_bytes <= 450.0 * (1 + 1e-9)
    assert found.extra_s == pytest.approx(50 * (1 - alpha))  # 25 layers of each policy


def test_too_little_memory_says_the_least() -> None:
    problem = chain(bandwidth=0.0, layers=3)
    with pytest.raises(NoFeasiblePlan, match="at least 3 B"):
        solve(problem)


def test_the_clock_ends_the_search_with_an_answer() -> None:
    ticks = iter(range(10**6))
    problem = random_problem(13)
    limits = replace(problem.limits, copy_bytes_per_s=2.0, host_bytes=float("inf"))
    problem = replace(problem, limits=replace(limits, device_bytes=0.4 * problem.keep_all_bytes))
    found = solve(problem, gap=0.0, time_limit_s=0.5, clock=lambda: float(next(ticks)))
    assert violations(problem, found) == [] and 0.0 <= found.gap <= 1.0


def test_wrong_answers_are_seen() -> None:
    problem = chain(bandwidth=16.0)
    found = solve(problem)
    use = found.policies[0]
    import msgspec

    fewer = msgspec.structs.replace(use, layers=use.layers - 1)
    assert violations(problem, msgspec.structs.replace(found, policies=(fewer,)))
    lost = msgspec.structs.replace(use, tensors=use.tensors[:-1])
    assert violations(problem, msgspec.structs.replace(found, policies=(lost,)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_bytes": -1.0},
        {"device_bytes": 1.0, "live_micro_batches": 0},
        {"device_bytes": 1.0, "copy_bytes_per_s": -2.0},
        {"device_bytes": float("nan")},
    ],
)
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Limits(**wrong)  # type: ignore[arg-type]
