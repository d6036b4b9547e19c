"""How much a precision in some layers moves the gradient of a model, measured.

    error(group, option) = mean over batches of  sum ||g' - g||^2 / sum ||g||^2

with g the gradients of all parameters in the plan's own precision, and g' those with the option in
the layers of the group alone, from the same parameters. Roundings of different layers are nearly
independent, so that their squared errors add (Hubara et al. 2021 assume the same of losses); the
parameters are those after some steps of training, since a model that has learned nothing has the
gradients of noise.

Runs in this process, on one device: the first CUDA device, or the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..catalogs import load_cluster
from ..errors import InputError
from ..mesh import Mesh
from ..plan import Plan, even_stages
from ..planner.precision.layers import Group, Settings, with_precision
from . import corpus
from .build import build
from .data import batch
from .torch_compat import local_tensor
from .trainer import Trainer

OnProgress = Callable[[float, float, str], None]
"""Pairs measured, how many there are, and the one at hand."""


def sensitivities(
    plan: Plan,
    options: Mapping[str, Settings],
    groups: Sequence[Group],
    *,
    steps: int = 20,
    batches: int = 2,
    on_progress: OnProgress | None = None,
) -> dict[tuple[Group, str], float]:
    """The error of every option in every group, after `steps` steps of training by the plan; zero
    where the option is what the plan does there already."""
    if plan.model.traced is not None:
        raise InputError("measure", plan.model.name, "a module of one's own keeps its precision",
                         "give the plan of a catalog model")  # fmt: skip
    own = plan.phase.technique("precision").get("compute", "bf16")
    for name, settings in options.items():
        if "fp32" in (own, settings["compute"]) and settings["compute"] != own:
            raise InputError("options", name, "layers of one model do not mix fp32 and others, "
                             f"and the plan's are {own}",
                             "plan with --precision bf16")  # fmt: skip
    text = np.frombuffer(corpus.load(plan.workload.data), dtype=np.uint8)
    with _one_rank() as device:
        alone = _alone(plan, device)
        trainer = build(alone, device=device)
        for step in range(steps):
            trainer.forward_backward(_tokens(trainer, text, step))
            trainer.optimizer_step()
        weights = {name: w.detach().clone() for name, w in trainer.named_parameters_full().items()}
        places = [steps + index for index in range(batches)]
        exact = [_gradients(trainer, weights, text, step) for step in places]
        del trainer
        errors: dict[tuple[Group, str], float] = {}
        pairs = [(group, name) for group in groups for name in options]
        for index, (group, name) in enumerate(pairs):
            changed = with_precision(alone, {group: options[name]})
            if changed == alone:
                errors[group, name] = 0.0
            else:
                other = build(changed, device=device)
                found = [
                    _error(_gradients(other, weights, text, step), known)
                    for step, known in zip(places, exact, strict=True)
                ]
                errors[group, name] = sum(found) / len(found)
            if on_progress is not None:
                on_progress(index + 1, len(pairs), f"{group[0]}-{group[1]} {name}")
    return errors


@contextmanager
def _one_rank() -> Iterator[torch.device]:
    """A process group of this process alone, unless there is one; the device to measure on."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_initialized():
        yield device
        return
    with tempfile.TemporaryDirectory(prefix="forerun-") as folder:
        store = Path(folder) / "store"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        try:
            yield device
        finally:
            dist.destroy_process_group()


def _alone(plan: Plan, device: torch.device) -> Plan:
    """The plan's layers and micro-batch on one device."""
    cluster = load_cluster("1xcpu")
    if device.type == "cuda":
        pool = msgspec.structs.replace(plan.cluster.pools[0], num_nodes=1, devices_per_node=1)
        cluster = msgspec.structs.replace(plan.cluster, pools=(pool,))
    phase = plan.phase
    seqs = phase.micro_batch_seqs
    kept = tuple(
        msgspec.structs.replace(
            setting, techniques={"precision": setting.techniques.get("precision", {})}
        )
        for setting in phase.settings
    )
    alone = msgspec.structs.replace(
        phase, mesh=Mesh(), zero=0, num_microbatches=1, schedule="1f1b", orders=None,
        sequence_parallel=False, settings=kept,
        stages=even_stages(plan.model.num_layers, 1, cluster.pools[0].name),
    )  # fmt: skip
    workload = msgspec.structs.replace(plan.workload, global_batch_seqs=seqs)
    return msgspec.structs.replace(plan, cluster=cluster, workload=workload, phases=(alone,))


def _tokens(trainer: Trainer, text: Any, step: int) -> Tensor:
    plan = trainer.plan
    return batch(text, plan.workload.seed, step, plan.phase, 0).to(trainer.device)


def _gradients(
    trainer: Trainer, weights: Mapping[str, Tensor], text: Any, step: int
) -> dict[str, Tensor]:
    """Gradients of one batch at these parameters."""
    with torch.no_grad():
        for piece in trainer.pieces:
            for name, parameter in piece.named_parameters():
                local_tensor(parameter).copy_(weights[name])
    trainer.forward_backward(_tokens(trainer, text, step))
    found = {name: g.detach().float().clone() for name, g in trainer.named_gradients().items()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def _error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Relative squared error over all parameters."""
    off = sum(float((found[name] - g).square().sum()) for name, g in exact.items())
    return off / sum(float(g.square().sum()) for g in exact.values())
