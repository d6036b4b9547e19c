"""Plans for the tests of the cost model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.mesh import Mesh
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.workload import Workload


def _make_plan(
    model: str = "llama-3.1-8b",
    gpus: str = "8xH100",
    *,
    seq_tokens: int = 8192,
    global_batch_seqs: int = 64,
    micro_batch_seqs: int = 1,
    compute: str = "bf16",
    recompute: str = "none",
    zero: int = 0,
    sp: bool = False,
    schedule: str = "1f1b",
    **degrees: int,
) -> Plan:
    """A plan with even stages; the mesh by degrees."""
    shape, cluster, mesh = load_model(model), load_cluster(gpus), Mesh(**degrees)
    settings: dict[str, Any] = techniques(compute, recompute)
    phase = Phase(
        steps=10,
        seq_tokens=seq_tokens,
        micro_batch_seqs=micro_batch_seqs,
        num_microbatches=global_batch_seqs // micro_batch_seqs // mesh.dp,
        mesh=mesh,
        zero=zero,  # pyright: ignore[reportArgumentType]
        sequence_parallel=sp,
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        stages=even_stages(shape.num_layers, mesh.num_stages, cluster.pools[0].name),
        settings=(Setting(layers=(0, shape.num_layers - 1), techniques=settings),),
    )
    workload = Workload(seq_tokens=seq_tokens, global_batch_seqs=global_batch_seqs)
    return Plan(model=shape, cluster=cluster, workload=workload, phases=(phase,))


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A function that builds plans from names and degrees."""
    return _make_plan
