"""The first stage of a pipeline, which keeps most micro-batches, as a problem's layers."""

from __future__ import annotations

import numpy as np

from ...cluster import Cluster
from ...costmodel.layout import Layouts
from ...costmodel.options import Options
from ...costmodel.prices import Prices
from ...costmodel.simulate import check_covered
from ...errors import InputError
from ...layout_rules import layout_problems
from ...mesh import Mesh
from ...model import Model
from ...schedules import SCHEDULES
from ..space import only_pool
from .problem import LayerType
from .tensors import Setting, layer_types


def first_stage(
    model: Model,
    cluster: Cluster,
    mesh: Mesh,
    *,
    seq_tokens: int,
    micro_batch_seqs: int = 1,
    sequence_parallel: bool = False,
    attention: str = "flash",
    num_layers: int | None = None,
) -> tuple[LayerType, ...]:
    """The layers of the first of `mesh.pp` equal stages, or the model's first `num_layers`.

    Raises
    ------
    InputError : the layout breaks a rule, or the stage is longer than the model.
    """
    check_covered(model)
    for problem in layout_problems(
        model, mesh, seq_tokens=seq_tokens, zero=0, sequence_parallel=sequence_parallel,
        schedule="1f1b", num_microbatches=mesh.pp,
    ):  # fmt: skip
        raise problem
    wanted = -(-model.num_layers // mesh.pp) if num_layers is None else num_layers
    if wanted > model.num_layers:
        raise InputError("layers", wanted, f"{model.name} has {model.num_layers}", "give fewer")
    pool = only_pool(cluster)
    compute = "fp32" if pool.device.kind == "cpu" else "bf16"
    if compute not in pool.device.peak_flops_per_s:
        compute = "fp16" if "fp16" in pool.device.peak_flops_per_s else "fp32"
    setting = Setting(
        model=model,
        layouts=_layout(mesh, micro_batch_seqs, sequence_parallel),
        seq_tokens=seq_tokens,
        prices=Prices(pool, cluster.profile, min(mesh.world, pool.devices_per_node)),
        options=Options(compute=compute, attention=attention),
    )
    return layer_types(setting, first_counts(model, wanted))


def first_counts(model: Model, num_layers: int) -> list[int]:
    """How many of the first `num_layers` layers are of each group of the model."""
    counts: list[int] = []
    for layer in model.layers:
        counts.append(min(layer.repeat, num_layers))
        num_layers -= counts[-1]
    return counts


def _layout(mesh: Mesh, micro_batch_seqs: int, sequence_parallel: bool) -> Layouts:
    numbers = {
        "micro_batch_seqs": micro_batch_seqs, "num_microbatches": mesh.pp,
        "dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "tp": mesh.tp,
        "pp": mesh.pp, "vpp": mesh.vpp, "zero": 0, "sequence_parallel": int(sequence_parallel),
        "schedule": SCHEDULES.index("1f1b"), "cp": mesh.cp, "ulysses": mesh.ulysses, "ep": mesh.ep,
    }  # fmt: skip
    return Layouts(**{name: np.array([value], np.int64) for name, value in numbers.items()})
