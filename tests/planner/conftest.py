"""A cost model with random but fixed costs, and small requests, for the tests of the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from forerun.choices import RECOMPUTE_MODES
from forerun.cluster import Cluster, Device, Link, Pool
from forerun.costmodel.bounds import Stages
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.estimate import Estimate, Interval
from forerun.model import Layer, Model
from forerun.plan import Plan, even_sizes
from forerun.planner.choosing import Choice
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
    cuts: bool = False
    """Whether costs differ from cut to cut: by up to a fifth of the time and a half of the peak."""

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

    def of_cut(
        self, layouts: Layouts, recompute: str, sizes: tuple[int, ...]
    ) -> tuple[Floats, Floats]:
        """The costs with stages of these sizes."""
        time_s, peaks = self.exact(layouts, recompute)
        if not self.cuts:
            return time_s, peaks
        salt = 100 + hash(sizes) % 10_007  # of a tuple of numbers: the same in every process
        faster = 1 - 0.2 * self.draw(layouts, recompute, salt)
        return time_s * faster, peaks * (1 - 0.5 * self.draw(layouts, recompute, salt + 1))

    def every_cut(self, num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
        """All ways of cutting layers into stages; of few stages those alone."""
        if not self.cuts:
            return [even_sizes(num_layers, num_stages)]
        inner = combinations(range(1, num_layers), num_stages - 1)
        return [tuple(b - a for a, b in pairwise([0, *x, num_layers])) for x in inner]

    def bound_layouts(
        self, model: Model, cluster: Cluster, workload: Workload, layouts: Layouts,
        options: Sequence[Options], capacity_bytes: Sequence[float], worth_s: float,
        stages: Stages,
    ) -> RandomBounds:  # fmt: skip
        """The least times and peaks of any option and cut, lowered at random."""
        times: list[Floats] = []
        peaks: list[Floats] = []
        least = (0.8, 0.5) if self.cuts else (1.0, 1.0)
        for recompute in (o.recompute for o in options):
            time_s, memory_bytes = self.exact(layouts, recompute)
            slack_s, slack_bytes = (self.slack * self.draw(layouts, recompute, n) for n in (3, 4))
            times.append(time_s * least[0] * (1 - slack_s))
            peaks.append(memory_bytes * least[1] * (1 - slack_bytes))
        return RandomBounds(np.min(times, axis=0), np.min(peaks, axis=0), self.capacity_bytes)

    def keep_sets(self, *_: object) -> tuple[tuple[str, ...], ...]:
        """No tensors by name."""
        return ()

    def choices(
        self, model: Model, cluster: Cluster, workload: Workload, layout: Layouts,
        policies: Sequence[Options], capacity_bytes: Sequence[float], stages: Stages,
    ) -> list[Choice]:  # fmt: skip
        """One option for all layers and a cut: the best that fits, else those with the least
        peak."""

        def worth(choice: Choice) -> tuple[bool, float]:
            assert choice.sizes is not None
            (time_s,), (peak,) = self.of_cut(layout, choice.layers[0].recompute, choice.sizes)
            unfit = bool(peak > self.capacity_bytes)
            least_peak = unfit or workload.objective == "memory"
            return unfit, float(peak if least_peak else time_s)

        cuts = self.every_cut(model.num_layers, int((layout.pp * layout.vpp)[0]))
        if stages != "free":
            cuts = [even_sizes(model.num_layers, len(cuts[0]))]
            cuts = cuts if isinstance(stages, str) else [tuple(stages)]
        every = [Choice(sizes=cut, layers=(option,)) for cut in cuts for option in policies]
        return [min(every, key=worth)]

    def estimate(self, plan: Plan) -> Estimate:
        """The exact costs of one plan."""
        phase = plan.phase
        sizes = tuple(stage.num_layers for stage in phase.stages)
        time_s, memory_bytes = self.of_cut(Layouts.of(phase), phase.recompute, sizes)
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
