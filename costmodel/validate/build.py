"""Rows as plans: a `Case` holds every plan that a row may stand for, and none is priced here.

A published plan may break rules that ours obey - a micro-batch that does not divide the batch,
chunks of unequal depth - so it is a `PublishedPlan`, which does not check them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ...catalogs.loader import load_stack
from ...catalogs.stacks_for import Published, stack_for_layout, stack_named_for
from ...errors import ForerunError
from ...mesh import Mesh
from ...model import Model
from ...plan import Phase, Plan, Setting, Stage, even_stages
from ...stack import Stack
from ...workload import Workload
from .cells import Layout, Recompute, Siblings, layouts, recompute_ladder
from .clusters import cluster_of, family_of
from .shapes import model_of, padded
from .table import Row, Unread
from .techniques import is_per_op, optimizer_of, techniques_of


class PublishedPlan(Plan, frozen=True, kw_only=True):
    """A plan that somebody ran: our own rules of layout do not bind it."""

    def check(self) -> None:
        """Nothing to refuse: it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One plan that a row may stand for."""

    plan: PublishedPlan
    micro_batches: float
    """Per replica and step; the plan has this number rounded up."""
    filled: tuple[str, ...]
    """`cell=value` of the cells that the row leaves empty."""
    changed: tuple[str, ...] = ()
    """Cells that had to be read as another value than they state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row with the plans that it may stand for."""

    row: Row
    model: Model
    """With the row's own vocabulary: what a FLOP convention counts."""
    ladders: tuple[tuple[Candidate, ...], ...]
    """Plans that differ in recomputation alone stand together, the fastest first."""


def build_cases(rows: Iterable[Row | Unread], *, named: bool = True) -> tuple[Case | Unread, ...]:
    """A case for every row; an `Unread` with the reason for one that makes no plan.

    Without `named` no source is known to any stack: the layout decides.
    """
    rows = tuple(rows)
    siblings = Siblings(row for row in rows if isinstance(row, Row))
    return tuple(row if isinstance(row, Unread) else _case(row, siblings, named) for row in rows)


def unread(row: Row, error: Exception) -> Unread:
    """A row that was read but cannot be predicted."""
    reason = str(error) if isinstance(error, ForerunError) else f"internal error: {error!r}"
    return Unread(
        id=row.id, source=row.source, metric=row.metric, measured=row.value, reason=reason
    )


def _case(row: Row, siblings: Siblings, by_name: bool) -> Case | Unread:
    try:
        model = model_of(row)
        named = _named_stack(row) if by_name else None
        ladders = tuple(
            _ladder(row, model, layout, named, siblings)
            for layout in layouts(row, siblings, model.num_layers, named)
        )
    except ForerunError as error:
        return unread(row, error)
    return Case(row=row, model=model, ladders=ladders)


def _named_stack(row: Row) -> Stack | None:
    """The stack that the row or its source names."""
    family = family_of(row.hardware)
    if row.stack:
        return load_stack(row.stack, family)
    published = Published(row.source, row.source_ref, row.note("release") or row.note("step") or "")
    return stack_named_for(published, family)


def _ladder(
    row: Row, model: Model, layout: Layout, named: Stack | None, siblings: Siblings
) -> tuple[Candidate, ...]:
    stack = named or stack_for_layout(
        family_of(row.hardware), tp=layout.tp, pp=layout.pp, zero=layout.zero
    )
    modes, open_mode = recompute_ladder(row, siblings, stack)
    result: list[Candidate] = []
    for recompute in modes:
        plan = _plan(row, padded(model, layout.tp, stack), layout, stack, recompute)
        result.append(
            Candidate(
                plan=plan,
                micro_batches=layout.micro_batches,
                filled=(*layout.filled, f"recompute={recompute}") if open_mode else layout.filled,
                changed=tuple(_changed(row, plan.phase)),
            )
        )
    return tuple(result)


def _plan(
    row: Row, model: Model, layout: Layout, stack: Stack, recompute: Recompute
) -> PublishedPlan:
    cluster = cluster_of(row, stack)
    mesh = mesh_of(row, layout)
    stages = even_stages(model.num_layers, mesh.num_stages, cluster.pools[0].name)
    phase = Phase(
        steps=1,
        seq_tokens=row.seq_len,
        micro_batch_seqs=layout.micro_batch_seqs,
        num_microbatches=_num_microbatches(layout),
        mesh=mesh,
        zero=cast("Literal[0, 1, 2, 3]", layout.zero),
        sequence_parallel=bool(row.sequence_parallel) and layout.tp > 1,
        schedule="interleaved" if layout.vpp > 1 else "1f1b",
        stages=stages,
        settings=_settings(row, model, stages, stack, recompute),
    )
    workload = Workload(
        seq_tokens=row.seq_len,
        global_batch_seqs=layout.global_batch_seqs,
        steps=1,
        optimizer=optimizer_of(row),
    )
    return PublishedPlan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def _settings(
    row: Row, model: Model, stages: Sequence[Stage], stack: Stack, recompute: Recompute
) -> tuple[Setting, ...]:
    """The techniques of all layers; where only a share recomputes in a mode, the last of every
    stage do."""

    def techniques(mode: str) -> dict[str, dict[str, Any]]:
        if mode == "selective":
            mode = "per_op" if is_per_op(row) else stack.selective_recompute
        return techniques_of(row, model, mode, stack)

    heavy = techniques(recompute.mode)
    if recompute.share == 1.0:
        return (Setting(layers=(0, model.num_layers - 1), techniques=heavy),)
    light = techniques(recompute.lighter)
    settings: list[Setting] = []
    for first, last in (stage.layers for stage in stages):
        middle = last + 1 - round(recompute.share * (last + 1 - first))
        if first < middle:
            settings.append(Setting(layers=(first, middle - 1), techniques=light))
        if middle <= last:
            settings.append(Setting(layers=(middle, last), techniques=heavy))
    return tuple(settings)


def mesh_of(row: Row, layout: Layout) -> Mesh:
    """The mesh: any ZeRO stage shards over all of dp, or over the noted `shard group N`."""
    shard = layout.dp if layout.zero else 1
    words = row.notes.lower().partition("shard group ")[2].split()
    group = words[0].rstrip(",;.") if words else ""
    if layout.zero and group.isdigit() and int(group) and layout.dp % int(group) == 0:
        shard = int(group)
    return Mesh(
        dp_replicate=layout.dp // shard,
        dp_shard=shard,
        cp=layout.cp,
        ulysses=layout.cp if row.says("ulysses") else 1,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        ep=layout.ep,
    )


def _changed(row: Row, phase: Phase) -> Iterator[str]:
    """Cells that are priced as another value than the row states."""
    used = {"vpp": phase.mesh.vpp, "micro_batch_seqs": phase.micro_batch_seqs}
    for cell, value in used.items():
        stated = getattr(row, cell)
        if stated not in (None, value):
            yield f"{cell}={stated} priced as {value}"


def _num_microbatches(layout: Layout) -> int:
    """Micro-batches, rounded up; an interleaved schedule runs them in rounds of pp."""
    number = max(1, math.ceil(layout.micro_batches))
    if layout.vpp > 1 and number > layout.pp:
        return -(-number // layout.pp) * layout.pp
    return number
