"""The grid agrees with the rule book, row by row."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.executors.support import check_executed
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.model import Experts
from forerun.planner.grid_plans import plan_at
from forerun.planner.legal_rows import legal
from forerun.planner.pins import Pins
from forerun.planner.space import divisors, enumerate_grid
from forerun.schedules import SCHEDULES
from forerun.workload import Workload

SMALL = st.integers(1, 6)
ROW = st.fixed_dictionaries(
    {
        "micro_batch_seqs": SMALL, "num_microbatches": st.integers(1, 12), "dp_replicate": SMALL,
        "dp_shard": SMALL, "tp": SMALL, "pp": SMALL, "vpp": st.integers(1, 3),
        "zero": st.integers(0, 3), "sequence_parallel": st.integers(0, 1),
        "schedule": st.integers(0, len(SCHEDULES) - 1), "cp": st.just(1), "ulysses": st.just(1),
        "ep": st.just(1),
    }
)  # fmt: skip


@settings(max_examples=100)
@given(
    rows=st.lists(ROW, min_size=1, max_size=40),
    heads=st.sampled_from([4, 6, 12]),
    groups=st.integers(1, 2),
    layers=st.integers(1, 12),
    seq_tokens=st.sampled_from([30, 64, 7]),
)
def test_legal_agrees_with_layout_problems(rows, heads, groups, layers, seq_tokens, model_of):
    model = model_of(layers=layers, heads=heads, kv_heads=heads // groups, vocab=60)
    grid = Layouts(**{name: np.array([row[name] for row in rows]) for name in rows[0]})
    for row, ok in zip(rows, legal(model, grid, seq_tokens), strict=True):
        mesh = Mesh(**{name: row[name] for name in ("dp_replicate", "dp_shard", "tp", "pp", "vpp")})
        problems = layout_problems(
            model,
            mesh,
            seq_tokens=seq_tokens,
            zero=row["zero"],
            sequence_parallel=bool(row["sequence_parallel"]),
            schedule=SCHEDULES[row["schedule"]],
            num_microbatches=row["num_microbatches"],
        )
        assert ok == (not list(problems)), row


@settings(max_examples=40)
@given(
    per_node=st.sampled_from([1, 2, 3, 4, 8]),
    nodes=st.integers(1, 4),
    layers=st.integers(1, 9),
    batch=st.integers(1, 48),
)
def test_every_row_is_a_plan_that_checks_and_no_two_are_alike(
    per_node, nodes, layers, batch, cluster_of, model_of
):
    model, cluster = model_of(layers=layers), cluster_of(per_node, nodes)
    workload = Workload(seq_tokens=64, global_batch_seqs=batch)
    grid = enumerate_grid(model, cluster, workload, Pins())
    labels = []
    for row in range(len(grid)):
        plan = plan_at(model, cluster, workload, grid, row, [Options(compute="bf16")])
        plan.check()
        labels.append(plan.label)
    assert len(set(labels)) == len(labels)


def test_rows_that_would_run_alike_appear_once(cluster_of, model_of):
    grid = enumerate_grid(
        model_of(), cluster_of(8), Workload(seq_tokens=64, global_batch_seqs=8), Pins()
    )
    pipeline = grid.pp > 1
    assert not np.any(pipeline & (grid.zero > 1))
    assert not np.any((grid.dp == 1) & (grid.zero > 0))
    assert not np.any((grid.num_microbatches == 1) & (grid.zero == 2))
    assert np.any(~pipeline & (grid.zero == 3)) and np.any(pipeline & (grid.zero == 1))


def test_hybrid_sharding_is_in_the_grid(cluster_of, model_of):
    workload = Workload(seq_tokens=64, global_batch_seqs=16)
    grid = enumerate_grid(model_of(), cluster_of(4, 4), workload, Pins(zero=3, tp=1, pp=1))
    shards = {(int(a), int(b)) for a, b in zip(grid.dp_replicate, grid.dp_shard, strict=True)}
    assert shards == {(8, 2), (4, 4), (2, 8), (1, 16)}


@given(st.integers(1, 5000))
def test_divisors(number: int):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@settings(max_examples=30)
@given(
    experts=st.sampled_from([6, 8, 12]),
    width=st.sampled_from([24, 30, 36]),
    devices=st.sampled_from([4, 6, 8]),
)
def test_plans_on_cpus_cut_experts_into_parts_that_run(experts, width, devices, model_of):
    model = model_of(layers=2, heads=4, kv_heads=4, vocab=60)
    layer = msgspec.structs.replace(
        model.layers[0], experts=Experts(num_experts=experts, top_k=2, ffn_hidden=width)
    )
    model = msgspec.structs.replace(model, layers=(layer,))
    cluster = load_cluster(f"{devices}xcpu")
    workload = Workload(seq_tokens=24, global_batch_seqs=24)
    grid = enumerate_grid(model, cluster, workload, Pins(micro_batch=1))
    assert (grid.ep > 1).any() and (grid.zero > 0).any()
    for row in range(0, len(grid), 7):
        check_executed(plan_at(model, cluster, workload, grid, row, [Options(compute="fp32")]))
