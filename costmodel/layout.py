"""Layouts as arrays, and the local axis sizes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from ..model import Experts, LatentAttention, Layer, Model
from ..plan import Phase
from ..schedules import SCHEDULES, SPLIT_SCHEDULES, V_SCHEDULES
from .graph import Array, Sizes
from .layers.rings import ring_sizes
from .layers.stacks import stack_sizes

Ints = NDArray[np.int64]
SPLITS = np.array([name in SPLIT_SCHEDULES for name in SCHEDULES])
FOLDED = np.array([name in V_SCHEDULES for name in SCHEDULES])
"""By schedule, in place of `np.isin`, which is slow on few rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """Many layouts at once: equal-length arrays; element i of each makes layout i.

    `schedule` indexes `forerun.schedules.SCHEDULES`; `sequence_parallel` is 0 or 1.
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
    cp: Ints
    ulysses: Ints
    ep: Ints
    apart: Ints = field(default_factory=lambda: np.ones(1, dtype=np.int64))
    """Replicas that train apart, each a layout of the other degrees; one where not given."""

    def __post_init__(self) -> None:
        if len(self.apart) != len(self.tp):
            object.__setattr__(self, "apart", np.ones_like(self.tp))

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def dp(self) -> Ints:
        """Data-parallel replicas that are one in every step."""
        return self.dp_replicate * self.dp_shard

    @property
    def together(self) -> Ints:
        """Ranks that are one in every step."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def replicas(self) -> Ints:
        """Those that see different sequences, whether or not they are one."""
        return self.dp * self.apart

    @property
    def world(self) -> Ints:
        """Ranks of each layout."""
        return self.together * self.apart

    @property
    def ring(self) -> Ints:
        """Ranks of context parallelism that pass keys and values on: the part beside ulysses."""
        return self.cp // self.ulysses

    @property
    def expert_tp(self) -> Ints:
        """Ranks over which tp cuts an expert: none where ep lies over the ranks of tp as well."""
        return np.where((self.dp * self.cp) % self.ep == 0, self.tp, 1)

    @property
    def even_tp(self) -> Ints:
        """Those of them whose rows are gathered in equal parts, dropless: where ep is 1."""
        return np.where(self.ep > 1, 1, self.expert_tp)

    @property
    def uneven_tp(self) -> Ints:
        """Those of them whose rows are as many as tokens chose."""
        return np.where(self.ep > 1, self.expert_tp, 1)

    @property
    def micro_batch_ranks(self) -> Ints:
        """Ranks that see different tokens of one micro-batch."""
        return self.cp * np.where(self.sequence_parallel > 0, self.tp, 1)

    @property
    def batch_ranks(self) -> Ints:
        """Ranks that see different tokens of one forward pass of all replicas."""
        return self.micro_batch_ranks * self.dp

    @property
    def splits(self) -> NDArray[np.bool_]:
        """Whether the schedule splits the backward."""
        return SPLITS[self.schedule]

    @property
    def folded(self) -> NDArray[np.bool_]:
        """Whether stages are placed in a V."""
        return FOLDED[self.schedule]

    @property
    def shards(self) -> Ints:
        """Ranks over which states are divided: under ZeRO those of cp too, which hold the same
        weights."""
        return self.dp_shard * np.where(self.zero > 0, self.cp, 1)

    @property
    def expert_holders(self) -> Array:
        """Ranks that hold the same experts."""
        return self._over_experts(self.dp * self.cp)

    @property
    def expert_shards(self) -> Array:
        """Those of them over which ZeRO divides the experts' states."""
        return np.maximum(1.0, self._over_experts(self.shards))

    def _over_experts(self, ranks: Ints) -> Array:
        """Ranks that hold the same dense weights, and those of tp where experts are not cut by it,
        shared among ep."""
        return ranks * self.tp / self.expert_tp / self.ep

    def take(self, index: NDArray[np.intp] | slice) -> Layouts:
        """The layouts at the given positions."""
        return Layouts(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def first(self, count: int) -> Layouts:
        """The first rows."""
        return self if count == len(self) else self.take(slice(0, count))

    @staticmethod
    def joined(parts: Sequence[Layouts]) -> Layouts:
        """Several blocks of layouts as one."""
        return Layouts(
            **{f.name: np.concatenate([getattr(x, f.name) for x in parts]) for f in fields(Layouts)}
        )

    @staticmethod
    def of(phase: Phase) -> Layouts:
        """One phase as layouts of length one."""
        mesh = phase.synced

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
            cp=one(mesh.cp),
            ulysses=one(mesh.ulysses),
            ep=one(mesh.ep),
            apart=one(phase.mesh.dp_replicate // mesh.dp_replicate),
        )


def local_sizes(model: Model, layer: Layer, layouts: Layouts, seq_tokens: int) -> Sizes:
    """Local size of every axis label under each layout, at the workload's sequence length."""
    own = _layer_sizes(model, layer, layouts, layer.tokens(seq_tokens))
    if model.is_decoder:
        return own
    each = [_layer_sizes(model, x, layouts, x.tokens(seq_tokens)) for x in model.stacks]
    compared = (layouts.micro_batch_seqs * layouts.dp).astype(float)
    return {**own, **stack_sizes(model, layer, each), "compared": compared}


def _layer_sizes(model: Model, layer: Layer, layouts: Layouts, seq_tokens: int) -> Sizes:
    """Local size of every axis label of a layer with `seq_tokens` tokens.

    tp divides heads, kv_heads, ffn and vocab; cp divides the sequence; `seq_part` is the sequence
    outside the matmuls, which sequence parallelism divides by tp as well; `seq_whole` is undivided.
    "tp", "cp", "ulysses", "ring" and "ep" are the degrees themselves.
    """

    def const(value: float) -> Array:
        return np.full(len(layouts), float(value))

    tp = layouts.tp.astype(float)
    cp, ep = layouts.cp.astype(float), layouts.ep.astype(float)
    part = np.where(layouts.sequence_parallel > 0, tp, 1.0)
    return {
        "batch": layouts.micro_batch_seqs.astype(float),
        "seq": seq_tokens / cp,
        "seq_part": seq_tokens / cp / part,
        "seq_whole": const(seq_tokens),
        "expert_seq": seq_tokens / cp / part * np.where(part > 1, layouts.expert_tp, 1),
        "hidden": const(model.width(layer)),
        "heads": layer.heads / tp,
        "kv_heads": layer.kv_heads / tp,
        "head_dim": const(layer.head_dim),
        "ffn": layer.ffn_hidden / tp,
        "vocab": model.vocab / tp,
        "positions": const(model.max_positions or 0),
        "one": const(1),
        "tp": tp,
        "cp": cp,
        "ulysses": layouts.ulysses.astype(float),
        "ring": layouts.ring.astype(float),
        "ep": ep,
        **_core_sizes(layer, layouts, seq_tokens),
        **(_latent_sizes(layer.latent, len(layouts)) if layer.latent is not None else {}),
        **(
            _expert_sizes(layer.experts, layouts, seq_tokens / cp / part)
            if layer.experts is not None
            else {}
        ),
    }


def _core_sizes(layer: Layer, layouts: Layouts, seq_tokens: int) -> Sizes:
    """Sizes in the attention core, behind ulysses' exchange: longer sequences of fewer heads.

    "kv_heads_sent" are the heads of K and V before it, repeated where there are fewer than ulysses
    ranks; "zigzag_squares", "ring_squares" and "lightseq_squares" the causal squares of `seq_core`
    tokens that the busiest ring rank works through (see `costmodel/layers/attention.py`);
    "core_dim" is the mean size of query and value heads, "kv_dims" a key's and a value's together;
    "if_ulysses" is one where there is an exchange, else zero.
    """
    tp, ulysses = layouts.tp.astype(float), layouts.ulysses.astype(float)
    ring = layouts.ring.astype(float)
    heads_core = layer.heads / tp / ulysses
    both = 2.0 * layer.head_dim
    if layer.latent is not None:
        a = layer.latent
        both = float(a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    sent = np.maximum(layer.kv_heads / tp, ulysses)
    keys, queries = sent / ulysses * both, heads_core * both / 2
    return {
        "heads_core": heads_core,
        "kv_heads_sent": sent,
        "kv_heads_core": sent / ulysses,
        "seq_core": seq_tokens / ring,
        "zigzag_squares": ring,
        "ring_squares": 2 * ring - 1,
        "core_dim": np.full(len(layouts), both / 2),
        "kv_dims": np.full(len(layouts), both),
        "if_ulysses": (ulysses > 1).astype(float),
        **ring_sizes(ring, keys, queries),
    }


def _latent_sizes(latent: LatentAttention, length: int) -> Sizes:
    """Ranks and head sizes of latent attention; none is divided."""
    a = latent
    sizes = {
        "q_rank": a.q_lora_rank or 0,
        "kv_rank": a.kv_lora_rank,
        "kv_latent": a.kv_lora_rank + a.qk_rope_head_dim,
        "nope_dim": a.qk_nope_head_dim,
        "rope_dim": a.qk_rope_head_dim,
        "qk_dim": a.qk_nope_head_dim + a.qk_rope_head_dim,
        "v_dim": a.v_head_dim,
        "nope_v_dim": a.qk_nope_head_dim + a.v_head_dim,
    }
    return {name: np.full(length, float(size)) for name, size in sizes.items()}


def _expert_sizes(experts: Experts, layouts: Layouts, seq_part: Array) -> Sizes:
    """Sizes of routed experts: ep divides them, tp their width.

    "copies" are the rows that a token becomes: top_k, or as many as fill all buffers to capacity;
    "held" those that a rank's experts get for each of its own tokens, the same on average. "sorted"
    is above 1 where rows arrive from several sources for several experts.
    """
    tp, ep = layouts.tp.astype(float), layouts.ep.astype(float)
    copies = np.full(len(layouts), float(experts.top_k))
    if experts.capacity_factor is not None:
        tokens = layouts.micro_batch_seqs * seq_part
        filled = experts.capacity_factor * experts.top_k * tokens / experts.num_experts
        copies = experts.num_experts * np.ceil(filled) / tokens
    gathered = np.where(layouts.sequence_parallel > 0, layouts.expert_tp, 1)
    local = experts.num_experts / ep
    return {
        "experts": local,
        "all_experts": np.full(len(layouts), float(experts.num_experts)),
        "all_slots": np.full(len(layouts), float(experts.num_experts)),
        "top_k": np.full(len(layouts), float(experts.top_k)),
        "copies": copies,
        "held": copies,
        "sorted": np.where(local > 1, ep * gathered, 1.0),
        "expert_ffn": experts.ffn_hidden / layouts.expert_tp,
        "expert_tp": layouts.expert_tp.astype(float),
        "even_tp": layouts.even_tp.astype(float),
        "uneven_tp": layouts.uneven_tp.astype(float),
        "micro_batch_ranks": layouts.micro_batch_ranks.astype(float),
        "batch_ranks": layouts.batch_ranks.astype(float),
        "shared_ffn": experts.shared_ffn_hidden / tp,
    }
