"""A cost model with random but fixed costs, and small requests, for the tests of the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from forerun.cluster import Cluster, Device, Link, Pool
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.estimate import Estimate, Interval
from forerun.model import Layer, Model
from forerun.plan import RECOMPUTE_MODES, Plan
from forerun.stack import Stack
from forerun.workload import Workload

Floats = NDArray[np.float64]


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): one well-mixed word per word."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@dataclass(frozen=True)
class RandomBounds:
    """Bounds as the cost model gives them."""

    time_s: Floats
    memory_bytes: Floats
    capacity_bytes: float

    @property
    def policies_bounded(self) -> NDArray[np.int64]:
        return np.ones(len(self.time_s), dtype=np.int64)


@dataclass(frozen=True)
class RandomCost:
    """Times and peaks drawn per layout from a seed; bounds are below them by up to `slack`.

    Layouts that run alike cost the same: one replica shards nothing, pipelines do not tell ZeRO
    stages apart, and one micro-batch makes stage 2 equal to stage 1.
    """

    seed: int
    capacity_bytes: int = 800
    slack: float = 0.3

    def draw(self, layouts: Layouts, recompute: str, salt: int) -> Floats:
        """One number in [0, 1) per layout."""
        pipeline = layouts.pp > 1
        zero = np.where(layouts.dp == 1, 0, layouts.zero)
        zero = np.where(pipeline & (zero > 0), 1, zero)
        zero = np.where((zero == 2) & (layouts.num_microbatches == 1), 1, zero)
        columns = (
            layouts.micro_batch_seqs, layouts.num_microbatches, layouts.dp_replicate,
            layouts.dp_shard, layouts.tp, layouts.pp, layouts.vpp, zero,
            layouts.sequence_parallel, np.where(pipeline, layouts.schedule, 0),
        )  # fmt: skip
        mode = RECOMPUTE_MODES.index(recompute)
        word = np.full(len(layouts), self.seed * 7919 + salt * 31 + mode, dtype=np.uint64)
        for column in columns:
            word = _mix(word * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64))
        return (word >> np.uint64(11)).astype(np.float64) / 2.0**53

    def exact(self, layouts: Layouts, recompute: str) -> tuple[Floats, Floats]:
        """Times in seconds and peaks in bytes."""
        return (
            1.0 + self.draw(layouts, recompute, 1),
            1000.0 * self.draw(layouts, recompute, 2),
        )

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Sequence[Options], capacity_bytes: float, worth_s: float,
    ) -> RandomBounds:  # fmt: skip
        """The least times and peaks of any option, lowered at random."""
        times: list[Floats] = []
        peaks: list[Floats] = []
        for recompute in (o.recompute for o in options):
            time_s, memory_bytes = self.exact(layouts, recompute)
            times.append(time_s * (1 - self.slack * self.draw(layouts, recompute, 3)))
            peaks.append(memory_bytes * (1 - self.slack * self.draw(layouts, recompute, 4)))
        return RandomBounds(np.min(times, axis=0), np.min(peaks, axis=0), self.capacity_bytes)

    def choose_layers(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options], capacity_bytes: float,
    ) -> tuple[Options, ...]:  # fmt: skip
        """One option for all layers: the best that fits, else the one with the least peak."""

        def worth(option: Options) -> tuple[bool, float]:
            time_s, peak = (float(x[0]) for x in self.exact(layout, option.recompute))
            unfit = peak > self.capacity_bytes
            return unfit, peak if unfit or workload.objective == "memory" else time_s

        return (min(policies, key=worth),)

    def estimate(self, plan: Plan) -> Estimate:
        """The exact costs of one plan."""
        phase = plan.phase
        time_s, memory_bytes = self.exact(Layouts.of(phase), phase.recompute)
        step_s, peak_bytes = float(time_s[0]), float(memory_bytes[0])
        return Estimate(
            step_s=Interval(median=step_s, low=0.9 * step_s, high=1.1 * step_s),
            tokens_per_s=plan.workload.global_batch_tokens / step_s,
            model_flops_per_s_per_device=1.0,
            mfu=0.5,
            peak_memory_bytes=Interval(median=peak_bytes, low=peak_bytes, high=peak_bytes),
            fits="yes" if peak_bytes <= self.capacity_bytes else "no",
            fit_probability=float(peak_bytes <= self.capacity_bytes),
            capacity_bytes=self.capacity_bytes,
            time_terms_s={"forward": 1.0, "bubble": step_s - 1.0},
            memory_terms_bytes={"parameters": peak_bytes / 2, "activations": peak_bytes / 2},
            bytes_on_wire={},
            evidence={},
        )


def make_cluster(devices_per_node: int, num_nodes: int = 1, kind: str = "gpu") -> Cluster:
    """A cluster of made-up devices."""
    link = Link(latency_s=1e-6, bytes_per_s=1e11)
    peaks = {"fp32": 1e13, "bf16": 1e14}
    pool = Pool(
        name="pool",
        device=Device(
            name="G", kind="cpu" if kind == "cpu" else "gpu", memory_bytes=1000,
            memory_bytes_per_s=1e12, peak_flops_per_s=peaks,
        ),
        devices_per_node=devices_per_node,
        num_nodes=num_nodes,
        intra_node=link,
        inter_node=link,
        stack=Stack(name="stack", gemm_efficiency={"bf16": 0.7}),
    )  # fmt: skip
    return Cluster(name="cluster", pools=(pool,))


def make_model(layers: int = 4, heads: int = 4, kv_heads: int = 4, vocab: int = 256) -> Model:
    """A small decoder."""
    layer = Layer(repeat=layers, heads=heads, kv_heads=kv_heads, head_dim=8, ffn_hidden=32)
    return Model(name="small", hidden=32, vocab=vocab, layers=(layer,))


@pytest.fixture(scope="session")
def random_cost() -> Callable[..., RandomCost]:
    return RandomCost


@pytest.fixture(scope="session")
def cluster_of() -> Callable[..., Cluster]:
    return make_cluster


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Model]:
    return make_model
