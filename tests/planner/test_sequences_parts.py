"""The parts of the solver of sequences: both forms of one rule, compositions, and prices."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.errors import InputError, NoFeasiblePlan
from forerun.planner import jit
from forerun.planner.sequences import longest_first, model_costs, published_costs, solve_groups
from forerun.planner.sequences.compositions import Estimate, candidates, every_composition
from forerun.planner.sequences.exchange import improve


def lengths_of(count: int, seed: int) -> np.ndarray:
    """Log-normal lengths that descend."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(4000), 1.2, count))
    return np.sort(np.clip(drawn, 1, 60_000).astype(np.int64))[::-1].copy()


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "has_numba", lambda: False)


@pytest.mark.skipif(not jit.has_numba(), reason="needs numba")
@pytest.mark.parametrize("seed", range(3))
def test_loops_and_heaps_give_the_same_times(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, tokens = published_costs(16, tokens_per_rank=16_384), lengths_of(30, seed)
    seconds, all_counts = costs.seconds(tokens), every_composition(costs.degrees, 16)
    compiled = longest_first.times_of(all_counts, tokens, seconds, costs)
    assert np.isfinite(compiled).any()
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    assert np.array_equal(longest_first.times_of(all_counts, tokens, seconds, costs), compiled)


@pytest.mark.skipif(not jit.has_numba(), reason="needs numba")
def test_the_answer_does_not_depend_on_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, tokens = published_costs(16, tokens_per_rank=8192), lengths_of(60, 7).tolist()
    compiled = solve_groups(tokens, costs, 16, certify=False)
    monkeypatch.setattr(jit, "has_numba", lambda: False)
    assert solve_groups(tokens, costs, 16, certify=False) == compiled


def test_the_plain_loop_is_the_compiled_one(without_numba: None) -> None:
    """The function that numba compiles, run as it stands."""
    costs, tokens = published_costs(8, tokens_per_rank=9000), lengths_of(12, 1)
    seconds, all_counts = costs.seconds(tokens), every_composition(costs.degrees, 8)
    result = np.empty(len(all_counts))
    longest_first._times_of(
        all_counts, tokens, seconds, np.array(costs.pass_s), np.array(costs.capacity_tokens),
        np.zeros(len(costs.degrees) + 1, dtype=np.int64), longest_first.MARGIN, np.inf, result,
    )  # fmt: skip
    assert np.array_equal(longest_first.times_of(all_counts, tokens, seconds, costs), result)


@pytest.mark.parametrize(("ranks", "count"), [(16, 36), (32, 202), (64, 1828)])
def test_number_of_compositions(ranks: int, count: int) -> None:
    degrees = tuple(1 << k for k in range(ranks.bit_length()))
    counts = every_composition(degrees, ranks)
    assert len(counts) == count == len({row.tobytes() for row in counts})
    assert (counts @ np.array(degrees) == ranks).all()


def test_climbed_compositions_use_every_rank() -> None:
    costs, tokens = published_costs(256, tokens_per_rank=8192), lengths_of(400, 3)
    estimate = Estimate(tokens, costs.seconds(tokens), costs, 256)
    counts, times = candidates(estimate, 0.1)
    assert (counts @ np.array(costs.degrees) == 256).all()
    assert (np.diff(times) >= 0).all()
    homogeneous = np.diag(256 // np.array(costs.degrees))
    assert times[0] <= estimate.seconds(homogeneous, 0.1).min()


def test_exchanges_never_slow_the_slowest_group() -> None:
    costs, tokens = published_costs(8, tokens_per_rank=50_000), lengths_of(24, 5)
    seconds = costs.seconds(tokens)
    start = [(1, [0, *range(4, 24)]), (1, [1]), (1, [2]), (1, [3])]
    after = improve(start, tokens, seconds, costs)

    def slowest(groups: list[tuple[int, list[int]]]) -> float:
        return max(float(seconds[members, d].sum()) for d, members in groups if members)

    assert slowest(after) < 0.5 * slowest(start)
    assert sorted(i for _, members in after for i in members) == list(range(24))
    assert all(tokens[members].sum() <= costs.capacity_tokens[d] for d, members in after)


def test_published_costs_are_those_of_the_paper_s_code() -> None:
    """16,384 tokens on two ranks: (5.128e-6 l^2 + 0.18396 l) / 2 ms and 8 MiB/token at 154 GB/s."""
    costs = published_costs(64, tokens_per_rank=16_384)
    l = 16_384
    work_ms = (5.128e-6 * l * l + 0.18396 * l) / 2
    moved_s = 4 * 2 * 2 * 32 * 4096 * l / (2 * 154e9)
    assert costs.seconds(np.array([l]))[0, 1] == pytest.approx(work_ms / 1e3 + moved_s)
    assert costs.pass_seconds([l], 2) == pytest.approx(0.6294 + work_ms / 1e3 + moved_s)


def test_prices_follow_the_cost_model() -> None:
    costs = model_costs(load_model("llama-2-7b"), load_cluster("8xH100"))
    assert costs.degrees == (1, 2, 4, 8) and costs.kinds[0] == "none"
    assert costs.fit_error < 0.1
    held = np.array(costs.capacity_tokens) / np.array(costs.degrees)
    assert (np.abs(held / held[0] - 1) < 0.2).all()  # activations are divided
    # more ranks are faster, and cost no fewer rank-seconds beyond what the fit is off by
    seconds = costs.seconds(np.array([4096]))[0]
    assert (np.diff(seconds) < 0).all()
    assert (seconds * np.array(costs.degrees) >= 0.9 * seconds[0]).all()
    # 6 FLOPs per parameter and token at most at the peak of 989 TFLOP/s
    assert costs.linear_s[0] > 6 * 6.6e9 / 989e12


def test_recompute_holds_more_and_takes_longer() -> None:
    model, cluster = load_model("llama-3.2-1b"), load_cluster("4xH100")
    kept, again = (model_costs(model, cluster, recompute=mode) for mode in ("none", "full"))
    assert again.capacity_tokens[0] > 1.5 * kept.capacity_tokens[0]
    assert again.seconds(np.array([4096]))[0, 0] > 1.1 * kept.seconds(np.array([4096]))[0, 0]


def test_kinds_and_degrees_follow_the_heads() -> None:
    """32 heads: all-to-all on 32 ranks at most, a ring beyond."""
    model, cluster = load_model("llama-3.2-1b"), load_cluster("8x8xH100")
    free = model_costs(model, cluster)
    assert free.degrees[-1] == 64 and free.kinds[-1] == "ring"
    assert model_costs(model, cluster, kind="ulysses").degrees[-1] == 32
    held = model_costs(model, cluster, kind="ring", max_degree=8, tokens_per_rank=1000)
    assert set(held.kinds) == {"none", "ring"}
    assert held.capacity_tokens == tuple(1000 * d for d in held.degrees)


def test_models_and_clusters_that_cannot_be_priced() -> None:
    with pytest.raises(InputError, match="power of two"):
        model_costs(load_model("llama-3.2-1b"), load_cluster("6xH100"))
    with pytest.raises(InputError, match="decoder"):
        model_costs(load_model("resnet-50"), load_cluster("8xH100"))
    with pytest.raises(NoFeasiblePlan, match="for 256 tokens"):
        model_costs(load_model("llama-2-70b"), load_cluster("1xH100"))
    with pytest.raises(InputError, match="kind"):
        model_costs(load_model("llama-3.2-1b"), load_cluster("8xH100"), kind="spiral")
