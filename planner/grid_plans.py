"""One row of the grid as a complete plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..cluster import Cluster
from ..costmodel.layer_tensors import settings_of
from ..costmodel.layout import Layouts
from ..costmodel.linears import named_linears
from ..costmodel.options import Options
from ..mesh import Mesh
from ..model import Model
from ..plan import Phase, Plan, even_sizes, stages_of
from ..schedules import SCHEDULES, Schedule, rank_of
from ..workload import Workload


def plan_at(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    grid: Layouts,
    row: int,
    layers: Sequence[Options],
    sizes: Sequence[int] | None = None,
) -> Plan:
    """One row of the grid as a complete plan; `layers` are the options of every layer in order, or
    one for all, `sizes` the layers of every stage, None for as even as can be. Its pipeline goes
    through the pools of the cluster in their order."""
    degrees = {
        axis: int(getattr(grid, axis)[row])
        for axis in ("dp_replicate", "dp_shard", "cp", "ulysses", "tp", "pp", "vpp", "ep")
    }
    degrees["dp_replicate"] *= int(grid.apart[row])
    mesh = Mesh(**degrees)
    here = grid.take(np.array([row]))
    layers = named_linears(model, cluster, here, workload.seq_tokens, layers)
    split = bool(grid.sequence_parallel[row])
    each = tuple(layers) * (model.num_layers if len(layers) == 1 else 1)
    if mesh.ulysses == mesh.cp > 1:
        each = tuple(replace(options, cp_kind="ulysses") for options in each)
    phase = Phase(
        steps=workload.steps,
        seq_tokens=workload.seq_tokens,
        micro_batch_seqs=int(grid.micro_batch_seqs[row]),
        num_microbatches=int(grid.num_microbatches[row]),
        mesh=mesh,
        zero=cast("Any", int(grid.zero[row])),
        sequence_parallel=split,
        schedule=cast("Schedule", SCHEDULES[int(grid.schedule[row])]),
        stages=stages_of(
            even_sizes(model.num_layers, mesh.num_stages) if sizes is None else sizes,
            pool_names(cluster, mesh, SCHEDULES[int(grid.schedule[row])]),
        ),
        settings=settings_of(model, each, cluster.pools[0], sequence_parallel=split),
    )
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def pool_names(cluster: Cluster, mesh: Mesh, schedule: str) -> list[str]:
    """The pool of every stage."""
    names = [pool.name for pool in cluster.pools for _ in range(pool.num_devices)]
    replicas = mesh.world // mesh.pp
    return [names[rank_of(schedule, stage, mesh.pp) * replicas] for stage in range(mesh.num_stages)]
