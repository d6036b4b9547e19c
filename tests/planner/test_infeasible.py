"""When there is no plan: what is missing, what would help, which pins contradict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from forerun.errors import InputError
from forerun.planner import Pins, search, why
from forerun.planner.choosing import Choice
from forerun.units import GIB
from forerun.workload import Workload


@dataclass(frozen=True)
class ShareCost:
    """Each device holds an equal share of the model and its micro-batch's activations."""

    random: Any
    model_gib: float
    gib_per_token: float = 0.0
    gib_per_micro_batch: float = 0.0
    capacity_gib: float = 10.0

    def peak_bytes(self, layouts: Any, seq_tokens: int) -> Any:
        shards = layouts.tp * layouts.pp * np.where(layouts.zero > 0, layouts.dp_shard, 1)
        activations = self.gib_per_token * seq_tokens * layouts.micro_batch_seqs
        in_flight = self.gib_per_micro_batch * layouts.num_microbatches
        return GIB * (self.model_gib / shards + activations + in_flight)

    def bound_layouts(
        self, model: Any, cluster: Any, workload: Any, layouts: Any, options: Any,
        capacity_bytes: Any, worth_s: float, stages: Any,
    ) -> Any:  # fmt: skip
        time_s, _ = self.random.exact(layouts, options[0].recompute)
        peak_bytes = self.peak_bytes(layouts, workload.seq_tokens)
        return Bounds(time_s, peak_bytes, self.capacity_gib * GIB)

    def keep_sets(self, model: Any, cluster: Any, workload: Any, grid: Any, base: Any) -> Any:
        return ()

    def choices(
        self, model: Any, cluster: Any, workload: Any, layout: Any, policies: Any,
        capacity_bytes: Any, stages: Any,
    ) -> Any:  # fmt: skip
        return [Choice(sizes=None, layers=policies[:1])]

    def estimate(self, plan: Any) -> Any:
        import msgspec

        from forerun.costmodel.layout import Layouts
        from forerun.estimate import Interval

        peak = float(self.peak_bytes(Layouts.of(plan.phase), plan.phase.seq_tokens)[0])
        capacity = int(self.capacity_gib * GIB)
        return msgspec.structs.replace(
            self.random.estimate(plan),
            peak_memory_bytes=Interval(median=peak, low=peak, high=peak),
            capacity_bytes=capacity,
            fits="yes" if peak <= capacity else "no",
        )


@dataclass(frozen=True)
class Bounds:
    time_s: Any
    memory_bytes: Any
    capacity_bytes: float

    @property
    def policies_bounded(self) -> Any:
        return np.ones(len(self.time_s), dtype=np.int64)


def test_says_by_how_much_and_which_pin_to_free(random_cost, cluster_of, model_of):
    cost = ShareCost(random_cost(seed=1), model_gib=32)
    result = search(
        model_of(), cluster_of(4), Workload(seq_tokens=64, global_batch_seqs=8),
        Pins(zero=0, tp=2, pp=1), cost=cost,
    )  # fmt: skip
    assert result.plans == () and result.stats.gap is None
    assert result.infeasible is not None
    assert "needs 16.00 GiB per device, 10.00 GiB usable" in result.infeasible.reason
    assert "short by 6.00 GiB" in result.infeasible.reason
    changes = result.infeasible.changes
    assert result.infeasible.smallest_change == changes[0]
    assert [change.split(" (")[0] for change in changes] == [
        "leave --tp 2 free", "leave --pp 1 free", "leave --zero 0 free",
    ]  # fmt: skip
    document = result.document()
    assert document["plans"] == [] and document["infeasible"]["reason"]
    assert why(result)[0].startswith("Nothing fits: ")


def test_more_devices_fill_the_node_and_then_add_nodes(random_cost, cluster_of, model_of):
    workload = Workload(seq_tokens=64, global_batch_seqs=64)
    for model_gib, expected in ((60, "--gpus 8xG"), (110, "--gpus 2x8xG"), (300, "--gpus 4x8xG")):
        cost = ShareCost(random_cost(seed=1), model_gib=model_gib)
        result = search(model_of(), cluster_of(4), workload, cost=cost)
        assert result.infeasible is not None
        assert result.infeasible.smallest_change.split(" (")[0] == expected


def test_a_shorter_sequence_helps_where_activations_are_the_cause(
    random_cost, cluster_of, model_of
):
    cost = ShareCost(random_cost(seed=1), model_gib=4, gib_per_token=0.01)
    workload = Workload(seq_tokens=4096, global_batch_seqs=8)
    result = search(model_of(), cluster_of(4, kind="cpu"), workload, cost=cost)
    assert result.infeasible is not None
    assert [change.split(" (")[0] for change in result.infeasible.changes] == ["--seq-len 512"]


def test_a_smaller_batch_is_named_where_nothing_else_helps(random_cost, cluster_of, model_of):
    cost = ShareCost(random_cost(seed=1), model_gib=1, gib_per_micro_batch=1)
    workload = Workload(seq_tokens=63, global_batch_seqs=32)
    result = search(model_of(), cluster_of(1, kind="cpu"), workload, Pins(micro_batch=1), cost=cost)
    assert result.infeasible is not None
    assert [change.split(" (")[0] for change in result.infeasible.changes] == [
        "leave --micro-batch 1 free"
    ]
    hidden = ShareCost(random_cost(seed=1), model_gib=1, gib_per_micro_batch=1, gib_per_token=0.1)
    result = search(model_of(), cluster_of(1, kind="cpu"), workload, cost=hidden)
    assert result.infeasible is not None
    assert [change.split(" (")[0] for change in result.infeasible.changes] == ["--global-batch 2"]


def test_says_when_no_single_change_helps(random_cost, cluster_of, model_of):
    cost = ShareCost(random_cost(seed=1), model_gib=1e6)
    result = search(
        model_of(), cluster_of(4), Workload(seq_tokens=64, global_batch_seqs=8), cost=cost
    )
    assert result.infeasible is not None and result.infeasible.changes == ()
    assert "no single change helps" in result.infeasible.smallest_change


@pytest.mark.parametrize(
    ("pins", "field", "words"),
    [
        (Pins(tp=3), "tp", "does not divide 8 devices"),
        (Pins(tp=8), "tp", "does not divide 4 attention heads"),
        (Pins(pp=8), "pp", "more stages than the 4 layers"),
        (Pins(dp=8), "dp", "does not divide the global batch of 12 sequences"),
        (Pins(micro_batch=5), "micro-batch", "does not divide the global batch of 12"),
        (Pins(tp=4, pp=4), "tp, pp", "--tp 4 --pp 4"),
        (Pins(tp=4, dp=4, recompute="full"), "tp, dp", "--tp 4 --dp 4"),
        (Pins(zero=0, dp_shard=2, pp=2), "dp-shard, zero", "--dp-shard 2 --zero 0"),
        (Pins(sp=True, tp=1), "tp, sp", "--tp 1 --sp"),
        (Pins(vpp=2, schedule="1f1b"), "vpp, schedule", "--vpp 2 --schedule 1f1b"),
        (Pins(tp=2, pp=2, dp=4), "tp, pp, dp", "--tp 2 --pp 2 --dp 4"),
    ],
)
def test_names_the_fewest_pins_that_contradict(
    pins: Pins, field: str, words: str, random_cost, cluster_of, model_of
):
    workload = Workload(seq_tokens=64, global_batch_seqs=12)
    with pytest.raises(InputError) as caught:
        search(model_of(), cluster_of(8), workload, pins, cost=random_cost(seed=1))
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "can be" in caught.value.remedy


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (Pins(tp=0), "tp=0: not positive"),
        (Pins(micro_batch=-1), "micro-batch=-1: not positive"),
        (Pins(cp_kind="striped"), "cp-kind=striped: not a choice; use one of zigzag"),
        (Pins(offload=1.5), "offload=1.5: not a fraction"),
        (Pins(zero=4), "zero=4: not a choice; use one of 0, 1, 2, 3"),
        (Pins(schedule="zb"), "schedule=zb: not a choice"),
        (Pins(recompute="some"), "recompute=some: not a choice"),
        (Pins(precision="fp8"), "precision=fp8: G has no such rate; use one of fp32, bf16"),
        (Pins(precision="int3"), "precision=int3: not a choice"),
    ],
)
def test_refuses_values_that_no_layout_has(pins, words, random_cost, cluster_of, model_of):
    workload = Workload(seq_tokens=64, global_batch_seqs=8)
    with pytest.raises(InputError, match=words):
        search(model_of(), cluster_of(8), workload, pins, cost=random_cost(seed=1))


def test_a_batch_that_no_layout_divides_names_one_that_works(random_cost, cluster_of, model_of):
    model, cluster = model_of(layers=2), cluster_of(7)
    with pytest.raises(InputError) as caught:
        search(
            model, cluster, Workload(seq_tokens=64, global_batch_seqs=5), cost=random_cost(seed=1)
        )
    assert caught.value.field == "global-batch" and "--global-batch 7" in caught.value.remedy
    fixed = Workload(seq_tokens=64, global_batch_seqs=7)
    assert search(model, cluster, fixed, cost=random_cost(seed=1, capacity_bytes=2000)).plans
