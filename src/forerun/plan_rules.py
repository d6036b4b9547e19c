"""The rules that a plan keeps: it does not contradict itself, its model or its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from .choices import COMPUTE_DTYPES, CP_KINDS, RECOMPUTE_MODES, TENSORS
from .errors import InputError
from .experts import check_placement
from .layout_rules import layout_problems
from .local_sgd import TECHNIQUE as LOCAL_SGD
from .local_sgd import LocalSgd
from .orders import check_orders, owners, splits
from .schedules import SPLIT_SCHEDULES, rank_of

if TYPE_CHECKING:
    from .plan import Phase, Plan


def check_phase(plan: Plan, phase: Phase) -> None:
    """Raise InputError for the first rule that a phase breaks: of its layout, its batch, its stages
    or the settings of its techniques."""
    mesh, model = phase.mesh, plan.model
    mesh.check_world(plan.cluster.num_devices)
    for problem in layout_problems(
        model,
        mesh,
        seq_tokens=phase.seq_tokens,
        zero=phase.zero,
        sequence_parallel=phase.sequence_parallel,
        schedule=phase.schedule,
        num_microbatches=phase.num_microbatches,
        own_orders=phase.orders is not None,
    ):
        raise problem
    _check_orders(phase)
    seqs = phase.micro_batch_seqs * phase.num_microbatches * mesh.dp
    if seqs != plan.workload.global_batch_seqs:
        raise InputError("global-batch", plan.workload.global_batch_seqs,
                         f"is not micro_batch_seqs={phase.micro_batch_seqs} * num_microbatches="
                         f"{phase.num_microbatches} * dp={mesh.dp} = {seqs}",
                         "change the micro-batch or dp")  # fmt: skip
    if len(phase.stages) != mesh.num_stages:
        raise InputError("stages", len(phase.stages), f"pp*vpp = {mesh.num_stages}",
                         "give one entry per stage")  # fmt: skip
    expected = 0
    for stage in phase.stages:
        first, last = stage.layers
        if first != expected or last < first:
            raise InputError("stages", f"[{first}, {last}]",
                             "stages must cover the layers in order, one or more each",
                             f"start this one at layer {expected}")  # fmt: skip
        plan.cluster.pool(stage.pool)
        expected = last + 1
    _check_pools(plan, phase)
    if expected != model.num_layers:
        raise InputError("stages", expected, f"{model.name} has {model.num_layers} layers",
                         "cover every layer once")  # fmt: skip
    for setting in phase.settings:
        _check_recompute(setting.techniques.get("recompute", {}))
    _check_local_sgd(plan, phase)
    if phase.compute_dtype not in COMPUTE_DTYPES:
        raise InputError("precision", phase.compute_dtype, "unknown dtype of matmuls",
                         f"use {', '.join(COMPUTE_DTYPES)}")  # fmt: skip
    routed = plan.workload.balance_loss != "none" or plan.workload.router_z_loss_coef > 0
    if routed and not any(layer.experts for layer in model.layers):
        raise InputError("balance_loss", plan.workload.balance_loss,
                         f"{model.name} has no routers to train by it", "leave it out")  # fmt: skip
    for setting in phase.settings:
        placed = setting.techniques.get("expert-placement")
        if placed is None:
            continue
        for index in range(setting.layers[0], min(setting.layers[1], model.num_layers - 1) + 1):
            experts = model.layer_at(index).experts
            if experts is not None:
                check_placement(placed, experts, mesh.ep)
    kind = str(phase.technique("context-parallel").get("kind", CP_KINDS[0]))
    if kind not in CP_KINDS:
        raise InputError("cp-kind", kind, "unknown kind of context parallelism",
                         f"use {', '.join(CP_KINDS)}")  # fmt: skip
    if kind == "ulysses" and mesh.ulysses != mesh.cp:
        raise InputError("cp-kind", kind,
                         f"is all of cp={mesh.cp}, not ulysses={mesh.ulysses} of it",
                         f"set ulysses to {mesh.cp}, or use zigzag")  # fmt: skip
    ring = mesh.cp // mesh.ulysses
    if kind == "lightseq" and ring > 1 and ring % 2:
        raise InputError("cp-kind", kind, f"pairs up the ranks of its ring, and {ring} is odd",
                         "use an even --cp, or zigzag")  # fmt: skip


def _check_local_sgd(plan: Plan, phase: Phase) -> None:
    """Replicas train apart in whole, all layers alike, and what they share is not shared apart."""
    own = [setting.techniques.get(LOCAL_SGD, {}) for setting in phase.settings]
    if not any(own):
        return
    if any(settings != own[0] for settings in own):
        raise InputError("local-sgd", own, "layers differ in it", "give all settings the same")
    local, mesh = LocalSgd.of(own[0]), phase.mesh
    assert local is not None
    for problem in local.problems(plan.model.num_layers):
        raise problem
    if mesh.dp_replicate == 1:
        raise InputError("local-sgd", local.period, "dp_replicate=1: there is one replica, and "
                         "none to meet", "raise --dp, or leave --dp-shard below it")  # fmt: skip
    for axis, why in (
        ("pp", "stages of a pipeline would meet apart"),
        ("cp", "ranks that share a sequence hold equal weights as replicas do"),
        ("ep", "experts are shared between replicas"),
    ):
        if getattr(mesh, axis) > 1:
            raise InputError("local-sgd", local.period, f"{axis}={getattr(mesh, axis)}: {why}",
                             f"use --{axis} 1, or no --local-sgd")  # fmt: skip
    if plan.workload.balance_loss == "global-batch":
        raise InputError("balance_loss", "global-batch",
                         "replicas that train apart share no counts",
                         "use micro-batch, or no --local-sgd")  # fmt: skip


def _check_recompute(technique: Mapping[str, Any]) -> None:
    """The mode is known, and names of tensors are there where it needs them."""
    mode, keep = technique.get("mode", "none"), technique.get("keep")
    if mode not in (*RECOMPUTE_MODES, TENSORS):
        raise InputError("recompute", mode, "unknown mode",
                         f"use {', '.join((*RECOMPUTE_MODES, TENSORS))}")  # fmt: skip
    listed = isinstance(keep, (list, tuple))
    names = cast("list[object]", keep) if listed else None
    if mode == TENSORS and (names is None or not all(isinstance(n, str) for n in names)):
        raise InputError("recompute.keep", keep, "not a list of tensors' names",
                         "name what a layer keeps, such as [\"q\", \"k\", \"v\"]")  # fmt: skip
    if mode != TENSORS and keep is not None:
        raise InputError("recompute.keep", keep, f"mode {mode} names no tensors",
                         f"use mode {TENSORS}, or drop keep")  # fmt: skip


def _check_pools(plan: Plan, phase: Phase) -> None:
    """Every rank lies in one pool, and every pool has as many ranks as it has devices."""
    mesh = phase.mesh
    of_rank: dict[int, str] = {}
    for index, stage in enumerate(phase.stages):
        rank = rank_of(phase.schedule, index, mesh.pp)
        if of_rank.setdefault(rank, stage.pool) != stage.pool:
            raise InputError("stages", stage.pool,
                             f"stage {index} is on rank {rank}, whose other stage is in pool"
                             f" {of_rank[rank]}", "give both the same pool")  # fmt: skip
    for pool in plan.cluster.pools:
        ranks = sum(name == pool.name for name in of_rank.values()) * (mesh.world // mesh.pp)
        if ranks != pool.num_devices:
            raise InputError("stages", pool.name,
                             f"{ranks} ranks lie in a pool of {pool.num_devices} devices",
                             "give every pool the stages that its devices hold")  # fmt: skip


def _check_orders(phase: Phase) -> None:
    """Orders of one's own are a schedule of this pipeline, placed as `schedule` places stages."""
    orders, mesh = phase.own_orders(), phase.mesh
    if orders is None:
        return
    if mesh.pp == 1:
        raise InputError(
            "orders", "given", "there is one pipeline rank", "raise --pp or leave them out"
        )
    if len(orders) != mesh.pp:
        raise InputError("orders", f"{len(orders)} ranks", f"the plan has pp={mesh.pp}",
                         f"give orders for {mesh.pp} ranks, or --pp {len(orders)}")  # fmt: skip
    count = 1 + max((micro for order in orders for _, _, micro in order), default=-1)
    if count != phase.num_microbatches:
        raise InputError("orders", f"{count} micro-batches",
                         f"the plan has {phase.num_microbatches} of them",
                         "change --global-batch, --micro-batch or the orders")  # fmt: skip
    check_orders(orders, mesh.num_stages, phase.num_microbatches)
    places = [rank_of(phase.schedule, stage, mesh.pp) for stage in range(mesh.num_stages)]
    if owners(orders) != places:
        raise InputError("orders", f"stages on ranks {owners(orders)}",
                         f"{phase.schedule} has them on {places}",
                         "set schedule to one with the placement of the orders")  # fmt: skip
    if splits(orders) and phase.schedule not in SPLIT_SCHEDULES:
        raise InputError("orders", "I and W", f"{phase.schedule} does not split the backward",
                         f"set schedule to one of {', '.join(SPLIT_SCHEDULES)}")  # fmt: skip
