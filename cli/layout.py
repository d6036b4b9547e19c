"""A plan for the layout that the user typed: nothing searched, absent axes 1 or off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from msgspec.structs import replace as replace_pins

from ..cluster import Cluster
from ..costmodel.options import Options
from ..errors import InputError
from ..mesh import Mesh
from ..model import Model
from ..orders import Orders, order_texts, owners
from ..plan import Phase, Plan, Setting, Stage, even_sizes, stages_of
from ..schedules import V_SCHEDULES, Schedule, schedule_of
from ..workload import Workload

if TYPE_CHECKING:
    from ..planner import Pins


def fixed_plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    pins: Pins,
    orders: Orders | None = None,
) -> Plan:
    """The plan of exactly these axes, checked.

    An axis that is None is 1 or off, stages are even; dp takes the ranks left; the matmuls run in
    bf16 (fp32 on CPUs); the schedule is 1F1B, in its interleaved form when vpp > 1; one sequence
    per micro-batch; states are sharded over all of dp when zero > 0 and dp_shard is not given.
    Pipeline `orders` of the user's own say what pp, vpp and the schedule are.
    """
    from ..planner.pins import check_precision, pinned_options

    if orders is not None:
        pins = _pins_of(orders, pins)
    mesh = _mesh(cluster, pins)
    micro_batch_seqs = pins.micro_batch or 1
    check_precision(pins)
    on_cpu = any(pool.device.kind == "cpu" for pool in cluster.pools)
    compute = pins.precision or ("fp32" if on_cpu else "bf16")
    options = replace(
        pinned_options(pins, compute),
        recompute=pins.recompute or "none",
        offload=pins.offload or 0.0,
    )
    if mesh.ulysses == mesh.cp > 1:
        options = replace(options, cp_kind="ulysses")
    default_schedule = "interleaved" if mesh.vpp > 1 else "1f1b"
    schedule = pins.schedule or default_schedule
    phase = Phase(
        steps=workload.steps,
        seq_tokens=workload.seq_tokens,
        micro_batch_seqs=micro_batch_seqs,
        num_microbatches=_num_microbatches(workload, mesh, micro_batch_seqs),
        mesh=mesh,
        zero=cast("Literal[0, 1, 2, 3]", pins.zero or 0),
        sequence_parallel=bool(pins.sp),
        schedule=cast("Schedule", schedule),
        orders=None if orders is None else order_texts(orders),
        stages=_stages(model, cluster, mesh, schedule, pins),
        settings=_settings(model, cluster, options, bool(pins.sp)),
    )
    plan = Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))
    plan.check()
    return plan


LAST_LAYERS = 2
"""At the end of the model, whose activations are not offloaded: their backward is next, so that
they would be back before they are gone (MEMO, arXiv 2407.12117, section 4.3)."""


def _settings(model: Model, cluster: Cluster, options: Options, split: bool) -> tuple[Setting, ...]:
    """The options of all layers; activations of the last ones stay on the device."""
    from ..costmodel.layer_tensors import check_keep, settings_of

    pool, num = cluster.pools[0], model.num_layers
    check_keep(model, options.keep, options.compute, pool)
    moves = options.offload > 0 or options.offload_rest == "recompute"
    num_last = LAST_LAYERS if moves and num > LAST_LAYERS else 0
    last = replace(options, offload=0.0, offload_rest="keep")
    each = [options] * (num - num_last) + [last] * num_last
    return settings_of(model, each, pool, sequence_parallel=split)


def _pins_of(orders: Orders, pins: Pins) -> Pins:
    """The pins with the pipeline that the orders are for."""
    if pins.schedule is not None:
        raise InputError("schedule", pins.schedule, "the orders are a schedule of their own",
                         "drop --schedule or --orders")  # fmt: skip
    found = {"pp": len(orders), "vpp": max(1, len(owners(orders)) // len(orders))}
    for axis, degree in found.items():
        if getattr(pins, axis) not in (None, degree):
            raise InputError(axis, getattr(pins, axis), f"the orders are for {axis}={degree}",
                             f"drop --{axis}")  # fmt: skip
    return replace_pins(pins, schedule=schedule_of(orders), **found)


def _stages(
    model: Model, cluster: Cluster, mesh: Mesh, schedule: str, pins: Pins
) -> tuple[Stage, ...]:
    """The stages asked for, or equal ones; pipelines go through the pools in their order."""
    from ..planner.grid_plans import pool_names
    from ..planner.pins import check_stages

    if mesh.num_stages > model.num_layers:
        raise InputError(
            "pp",
            mesh.pp,
            f"vpp={mesh.vpp} makes {mesh.num_stages} stages of the "
            f"{model.num_layers} layers of {model.name}",
            "lower --pp or --vpp",
        )
    check_stages(pins, model)
    sizes = even_sizes(model.num_layers, mesh.num_stages)
    if isinstance(pins.stages, tuple):
        sizes = pins.stages
    if len(sizes) != mesh.num_stages:
        raise InputError(
            "stages",
            ",".join(map(str, sizes)),
            f"are {len(sizes)} stages, pp*vpp is {mesh.num_stages}",
            f"give {mesh.num_stages} numbers, or change --pp or --vpp",
        )
    return stages_of(sizes, pool_names(cluster, mesh, schedule))


def _mesh(cluster: Cluster, pins: Pins) -> Mesh:
    """The degrees asked for; dp, when free, takes the ranks that the others leave."""
    world = cluster.num_devices
    given = {axis: getattr(pins, axis) for axis in ("tp", "pp", "cp")}
    tp, pp, cp = (degree or 1 for degree in given.values())
    inner = tp * pp * cp
    product = " * ".join(f"{axis}={n}" for axis, n in given.items() if n is not None)
    if pins.dp is None and world % inner:
        raise InputError(
            "mesh",
            product,
            f"{inner} does not divide {world} devices",
            "change --tp, --pp, --cp or --gpus",
        )
    dp = pins.dp or world // inner
    if dp * inner != world:
        raise InputError(
            "dp",
            dp,
            f"{product or 'tp=1'} * dp={dp} = {dp * inner}, not the {world} "
            f"devices of {cluster.name}",
            "leave --dp free or change a degree",
        )
    dp_shard = pins.dp_shard or (dp if pins.zero else 1)
    if dp % dp_shard:
        raise InputError("dp-shard", dp_shard, f"does not divide dp={dp}", "give a divisor of dp")
    return Mesh(
        dp_replicate=dp // dp_shard,
        dp_shard=dp_shard,
        cp=cp,
        ulysses=_ulysses(cluster, pins, tp, cp),
        tp=tp,
        pp=pp,
        vpp=pins.vpp or (2 if pins.schedule in V_SCHEDULES else 1),
        ep=pins.ep or 1,
    )


def _ulysses(cluster: Cluster, pins: Pins, tp: int, cp: int) -> int:
    """The part of cp that exchanges by all-to-all: none, all, or for usp what shares a node."""
    if pins.cp_kind == "ulysses":
        return cp
    if pins.cp_kind != "usp":
        return 1
    inside = max(2, min(pool.devices_per_node for pool in cluster.pools) // tp)
    parts = [n for n in range(2, cp) if cp % n == 0]
    if not parts:
        raise InputError("cp-kind", "usp", f"cp={cp} has no two parts", "use zigzag or ulysses")
    return max((n for n in parts if n <= inside), default=parts[0])


def _num_microbatches(workload: Workload, mesh: Mesh, micro_batch_seqs: int) -> int:
    """Forward passes per replica and step."""
    batch = workload.global_batch_seqs
    if batch % mesh.dp:
        raise InputError(
            "global-batch",
            batch,
            f"dp={mesh.dp} does not divide it",
            f"give a multiple of {mesh.dp} sequences or another --dp",
        )
    if (batch // mesh.dp) % micro_batch_seqs:
        raise InputError(
            "micro-batch",
            micro_batch_seqs,
            f"does not divide the {batch // mesh.dp} sequences of a replica",
            "give a divisor",
        )
    return batch // mesh.dp // micro_batch_seqs
