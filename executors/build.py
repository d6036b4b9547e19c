"""A plan as this rank's part of a real training run.

Order: pieces on the meta device, adapters, precision, context, tensor and expert parallel, storage
of frozen weights, compilation, recompute and offload, FSDP2 or DDP, memory and initial parameters,
pipeline schedule, optimiser.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ..mesh import Mesh
from ..plan import Plan
from . import context_parallel, data_parallel, init, keeping, tensor_parallel, traced
from .away import Away
from .decoder import Decoder
from .experts.parallel import ExpertParallel, has_experts
from .frozen.base import Base
from .halo_gather import CodedGathers
from .marks import Marks
from .pipeline import Pipeline, local_stages
from .support import check_executed
from .techniques import halo, lora, precision, runtime
from .torch_compat import DeviceMesh
from .trainer import Trainer, tied_groups


def check_supported(plan: Plan) -> None:
    """Raise InputError for a plan that contradicts itself or that this executor cannot run."""
    plan.check()
    check_executed(plan)
    if plan.model.traced is not None:
        traced.check_supported(plan)


def make_mesh(mesh: Mesh, device: torch.device) -> DeviceMesh:
    """The device mesh with the axes and rank order of `Mesh`."""
    shape = mesh.shape()
    return init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def build_piece(
    plan: Plan,
    stage: int,
    mesh: DeviceMesh,
    device: torch.device,
    marks: Marks,
    away: Away,
    spread: context_parallel.Spread,
    experts: ExpertParallel | None = None,
    first_piece: Decoder | None = None,
    base: Base | None = None,
) -> tuple[Decoder, nn.Module, dict[str, int]]:
    """One stage's piece of the model, the module to call (the piece, or DDP around it), tp cuts.

    `first_piece` is the one with the embedding where this rank has built it already; `base` holds
    the weights that adapters train beside.
    """
    phase = plan.phase
    first, last = phase.stages[stage].layers
    with torch.device("meta"):
        piece = Decoder(plan.model, first, last, first_piece)
    piece.spread = spread
    lora.apply(piece, phase)
    shapes = {name: tuple(p.shape) for name, p in piece.named_parameters()}
    precision.apply(piece, phase, device)
    tp_dims: dict[str, int] = {}
    if phase.mesh.tp > 1:
        sequence_parallel, expert_tp = phase.sequence_parallel, phase.mesh.expert_tp
        tp_dims = tensor_parallel.apply(piece, mesh["tp"], sequence_parallel, expert_tp)
    if experts is not None:
        experts.apply(piece)
    tp = (mesh.get_local_rank("tp"), phase.mesh.tp)
    lora.store(piece, phase, shapes, tp_dims, tp)
    runtime.apply(piece, phase)
    blocks = ((int(index), block) for index, block in piece.blocks.items())
    keeping.apply(blocks, plan, marks, away.mover, device)
    if data_parallel.uses_fsdp(phase):
        data_parallel.apply_fsdp(piece, phase, mesh, experts)
    at_rest = away.parameters_device(device)
    piece.to_empty(device=at_rest)
    cut = init.Cut(shapes=shapes, tp_dims=tp_dims, tp=tp)
    init.initialise(piece, plan.model, plan.workload.seed, cut, at_rest, experts, base)
    if data_parallel.uses_ddp(phase):
        return piece, data_parallel.apply_ddp(piece, phase, mesh, experts), tp_dims
    return piece, piece, tp_dims


def build(
    plan: Plan,
    *,
    device: torch.device,
    module: str | None = None,
    offload_folder: Path | None = None,
    base: Path | None = None,
) -> Trainer:
    """This rank's trainer; the process group is initialised and has `mesh.world` ranks.

    `module` names the function that makes a user's module, for a plan that was traced from it;
    `offload_folder` is where files of offloaded tensors lie (default: for temporary files). `base`
    is a folder with a checkpoint, or with quantised weights, that adapters train beside (default:
    initial weights).
    """
    check_supported(plan)
    phase = plan.phase
    phase.mesh.check_world(dist.get_world_size())
    mesh = make_mesh(phase.mesh, device)
    marks = Marks()
    away = Away.of(plan, marks, device, offload_folder)
    if module is not None:
        return traced.build(plan, module, mesh, device, marks, away)
    stages = local_stages(phase, mesh.get_local_rank("pp"))
    spread = context_parallel.over_mesh(phase)
    experts = ExpertParallel(plan, mesh, device) if has_experts(plan) else None
    weights = None if base is None else Base.of(base, plan)
    built: list[tuple[Decoder, nn.Module, dict[str, int]]] = []
    for stage in stages:
        first_piece = built[0][0] if built and built[0][0].is_first else None
        part = build_piece(plan, stage, mesh, device, marks, away, spread, experts, first_piece,
                           weights)  # fmt: skip
        built.append(part)
    pieces, modules = [piece for piece, _, _ in built], [module for _, module, _ in built]
    tp_dims = {name: dim for _, _, cut in built for name, dim in cut.items()}
    gathers = _coded_gathers(plan, pieces, mesh, device)
    pipeline = None
    if phase.mesh.pp > 1:
        pipeline = Pipeline(pieces, phase, plan.model, mesh, device, marks, experts)
    if experts is not None:
        experts.watch(pieces, data_parallel.uses_fsdp(phase))
    trainer = Trainer(
        plan,
        device,
        mesh,
        pieces,
        modules,
        pipeline,
        away.make_optimizer(plan.workload, [p for x in pieces for p in x.named_parameters()]),
        tied_groups(plan),
        tp_dims,
        marks,
        away,
        experts,
    )
    trainer.spread, trainer.gathers = spread, gathers
    if phase.local_sgd is not None:
        trainer.meet_as(phase.local_sgd)
    return trainer


def _coded_gathers(
    plan: Plan, pieces: list[Decoder], mesh: DeviceMesh, device: torch.device
) -> list[CodedGathers]:
    """The weights that FSDP gathers as codes."""
    if not data_parallel.uses_fsdp(plan.phase):
        return []
    shards = data_parallel.shard_group(plan.phase, mesh)
    return [x for piece in pieces for x in halo.extend_gathers(piece, plan.phase, shards, device)]
