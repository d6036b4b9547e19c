"""Layouts as arrays, and the local axis sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..model import Layer, Model
from ..plan import SCHEDULES, Phase
from .graph import Array, Sizes

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """Many layouts at once: equal-length arrays; element i of each makes layout i.

    `schedule` indexes `forerun.plan.SCHEDULES`; `sequence_parallel` is 0 or 1.
    """

    micro_batch_seqs: Ints
    num_microbatches: Ints
    dp_replicate: Ints
    dp_shard: Ints
    tp: Ints
    pp: Ints
    vpp: Ints
    zero: Ints
    sequence_parallel: Ints
    schedule: Ints

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def dp(self) -> Ints:
        """Data-parallel replicas."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> Ints:
        """Ranks of each layout."""
        return self.dp * self.tp * self.pp

    def take(self, index: NDArray[np.intp] | slice) -> Layouts:
        """The layouts at the given positions."""
        return Layouts(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def of(phase: Phase) -> Layouts:
        """One phase as layouts of length one."""
        mesh = phase.mesh

        def one(value: int) -> Ints:
            return np.array([value], dtype=np.int64)

        return Layouts(
            micro_batch_seqs=one(phase.micro_batch_seqs),
            num_microbatches=one(phase.num_microbatches),
            dp_replicate=one(mesh.dp_replicate),
            dp_shard=one(mesh.dp_shard),
            tp=one(mesh.tp),
            pp=one(mesh.pp),
            vpp=one(mesh.vpp),
            zero=one(phase.zero),
            sequence_parallel=one(int(phase.sequence_parallel)),
            schedule=one(SCHEDULES.index(phase.schedule)),
        )


def local_sizes(model: Model, layer: Layer, layouts: Layouts, seq_tokens: int) -> Sizes:
    """Local size of every axis label under each layout.

    tp divides heads, kv_heads, ffn and vocab; `seq_part` is the sequence outside the matmuls, which
    sequence parallelism divides by tp as well. "tp" is the degree itself.
    """

    def const(value: float) -> Array:
        return np.full(len(layouts), float(value))

    tp = layouts.tp.astype(float)
    part = np.where(layouts.sequence_parallel > 0, tp, 1.0)
    return {
        "batch": layouts.micro_batch_seqs.astype(float),
        "seq": const(seq_tokens),
        "seq_part": seq_tokens / part,
        "hidden": const(model.hidden),
        "heads": layer.heads / tp,
        "kv_heads": layer.kv_heads / tp,
        "head_dim": const(layer.head_dim),
        "ffn": layer.ffn_hidden / tp,
        "vocab": model.vocab / tp,
        "positions": const(model.max_positions or 0),
        "one": const(1),
        "tp": tp,
    }
