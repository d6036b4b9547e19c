"""Rows of the grid that keep the rules of `forerun.layout_rules`, column by column."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..costmodel.layout import Layouts
from ..costmodel.techniques import halo
from ..layout_rules import UNDIVIDED
from ..model import Model
from ..schedules import LOOPED_SCHEDULES, SCHEDULES, SPLIT_SCHEDULES, V_SCHEDULES
from ..traced import Traced

GPIPE = SCHEDULES.index("gpipe")
DUALPIPEV = SCHEDULES.index("dualpipev")
SPLIT = tuple(map(SCHEDULES.index, SPLIT_SCHEDULES))
LOOPED = tuple(map(SCHEDULES.index, LOOPED_SCHEDULES))
V_SHAPED = tuple(map(SCHEDULES.index, V_SCHEDULES))


def legal(model: Model, grid: Layouts, seq_tokens: int) -> NDArray[np.bool_]:
    """True where a row breaks no rule of `forerun.layout_rules.layout_problems`."""
    ok = np.ones(len(grid), dtype=bool)
    for width in sorted(_divided_widths(model)):
        ok &= width % grid.tp == 0
    if model.traced is not None:
        ok &= _legal_traced(model.traced, grid)
    sp = grid.sequence_parallel == 1
    ok &= ~sp | (grid.tp > 1)
    for tokens in model.lengths(seq_tokens):
        ok &= ~sp | ((tokens // grid.cp) % grid.tp == 0)
        ok &= (grid.cp == 1) | (tokens % (2 * grid.cp) == 0)
    for kind, _, axes in UNDIVIDED:
        for axis in axes if any(layer.kind == kind for layer in model.layers) else ():
            ok &= getattr(grid, axis) == 1
    ok &= grid.pp * grid.vpp <= model.num_layers
    ok &= _legal_schedules(grid)
    ok &= (grid.dp_shard == 1) | (grid.zero > 0)
    ok &= grid.cp % grid.ulysses == 0
    return ok & _legal_experts(model, grid) & _legal_ulysses(model, grid)


def rotatable(model: Model, grid: Layouts, seq_tokens: int, recipe: str) -> NDArray[np.bool_]:
    """True where a recipe of HALO rotates every layer's shapes."""
    shards = np.where(grid.zero > 0, grid.dp_shard * grid.cp, grid.dp_shard)
    tokens = grid.micro_batch_seqs * (seq_tokens // grid.cp)
    shapes, row_of = np.unique(np.stack([grid.tp, tokens, shards]), axis=1, return_inverse=True)
    fits = [
        all(
            halo.problem(model, layer, recipe, None, tp=tp, tokens=tokens, shards=shards) is None
            for layer in model.layers
        )
        for tp, tokens, shards in shapes.T.tolist()
    ]
    return np.array(fits, dtype=bool)[row_of.reshape(-1)]


def _divided_widths(model: Model) -> set[int]:
    """The sizes that tp must divide; a traced module tells the degrees instead."""
    if model.traced is not None:
        return set()
    widths = {model.vocab}
    for layer in model.layers:
        widths |= {layer.heads, layer.kv_heads, *layer.mlp_widths}
    return widths


def _legal_traced(traced: Traced, grid: Layouts) -> NDArray[np.bool_]:
    """What a user's module says of how it can be divided."""
    degrees = traced.divided.degrees if traced.divided is not None else ()
    ok = np.isin(grid.tp, (1, *degrees)) & (grid.sequence_parallel == 0)
    ok &= (grid.cp == 1) & (grid.ep == 1) & ~np.isin(grid.schedule, SPLIT)
    return ok if traced.hidden else ok & (grid.pp == 1)


def _legal_schedules(grid: Layouts) -> NDArray[np.bool_]:
    """Each schedule has its chunks per rank and its least number of micro-batches."""
    pipeline, count = grid.pp > 1, grid.num_microbatches
    looped, folded = np.isin(grid.schedule, LOOPED), np.isin(grid.schedule, V_SHAPED)
    ok = (grid.vpp == 1) | (pipeline & (looped | folded))
    ok &= pipeline | ~np.isin(grid.schedule, SPLIT)
    ok &= ~folded | (grid.vpp == 2)
    ok &= ~(looped & pipeline) | ((grid.vpp > 1) & (count % grid.pp == 0))
    rounds = np.where(grid.schedule == DUALPIPEV, 2, 1)
    return ok & (~pipeline | (grid.schedule == GPIPE) | (count >= rounds * grid.pp))


def _legal_experts(model: Model, grid: Layouts) -> NDArray[np.bool_]:
    """Experts are shared out evenly, over ranks that hold the same dense weights or, where these
    split the sequence, over tp too; states are divided into equal parts."""
    holders = grid.dp * grid.cp
    apart = holders % grid.ep == 0
    split = (grid.sequence_parallel == 1) | (grid.tp == 1)
    ok = apart | (((holders * grid.tp) % grid.ep == 0) & split)
    sharing = grid.shards * grid.tp // grid.expert_tp
    ok &= (sharing % grid.ep == 0) | (grid.ep % sharing == 0)
    counts = [layer.experts.num_experts for layer in model.layers if layer.experts is not None]
    if not counts:
        return ok & (grid.ep == 1)
    for count in counts:
        ok &= count % grid.ep == 0
    return ok


def even_experts(model: Model, grid: Layouts) -> NDArray[np.bool_]:
    """True where ZeRO cuts the experts of a rank into equal parts, by number or along their widths:
    others cannot be run (`executors/support.py`)."""
    ok = np.ones(len(grid), dtype=bool)
    shards = np.maximum(1, grid.shards * grid.tp // grid.expert_tp // grid.ep)
    for layer in model.layers:
        if layer.experts is None:
            continue
        by_number = layer.experts.num_experts // grid.ep % shards == 0
        width = layer.experts.ffn_hidden // grid.expert_tp
        by_width = (width % shards == 0) & (model.hidden % shards == 0)
        ok &= (grid.zero == 0) | by_number | by_width
    return ok


def _legal_ulysses(model: Model, grid: Layouts) -> NDArray[np.bool_]:
    """Each rank of the exchange gets whole heads."""
    ok = np.ones(len(grid), dtype=bool)
    for layer in model.layers:
        groups = layer.kv_heads // grid.tp
        uneven = (groups % grid.ulysses != 0) & (grid.ulysses % np.maximum(groups, 1) != 0)
        ok &= (layer.heads % (grid.tp * grid.ulysses) == 0) & ~((groups > 0) & uneven)
    return ok | (grid.ulysses == 1)
