"""Whether this machine, or these nodes, can run a plan; answered before any process starts."""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from ..document import Value
from ..errors import InputError, RunFailed
from ..model import Model
from ..plan import Plan, PlanFile
from ..units import format_bytes
from . import failures, job
from .checkpoints import folder


class Nodes(Value, frozen=True, kw_only=True):
    """This machine's place among several that run one plan together."""

    num: int
    node: int
    """This machine's place, from 0; ranks count node by node."""
    rendezvous: str
    """HOST:PORT of node 0, which all can reach."""


def check_module(plan: Plan, module: str | None) -> None:
    """Raise InputError unless `module` is what a traced plan was made from, unchanged."""
    traced = plan.model.traced
    if traced is None and module is not None:
        raise InputError("model", module, f"the plan trains {plan.model.name}, no module of yours",
                         "drop --model")  # fmt: skip
    if traced is None:
        return
    if module is None:
        raise InputError("model", "(missing)",
                         f"the plan trains {traced.target}, and a plan never runs code by itself",
                         f"add --model {traced.target}")  # fmt: skip
    from .trace_module import trace

    if _unnamed(trace(module, traced.seq_tokens)) != _unnamed(plan.model):
        raise InputError("model", module, f"is not {traced.target} as it was when it was planned",
                         f"give --model {traced.target}, or plan again")  # fmt: skip


def _unnamed(model: Model) -> Model:
    """A traced model without what it was called, which another path or name may be."""
    assert model.traced is not None
    traced = msgspec.structs.replace(model.traced, target="")
    return msgspec.structs.replace(model, name="", traced=traced)


def check_machine(
    plan: Plan, nodes: Nodes | None = None, emulates_links: bool = False
) -> Literal["cpu", "cuda"]:
    """The kind of device to run on; raises InputError when what is planned is not here."""
    per_node = ranks_per_node(plan, nodes, emulates_links)
    needed = per_node[nodes.node if nodes is not None else 0]
    if plan.cluster.pools[0].device.kind == "cpu":
        return "cpu"
    found = num_cuda_devices()
    if found < needed:
        names = ", ".join(dict.fromkeys(pool.device.name for pool in plan.cluster.pools))
        raise InputError("gpus", f"{needed} x {names}", f"this machine has {found} CUDA devices",
                         "run there, or plan again with --gpus 2xcpu")  # fmt: skip
    return "cuda"


def ranks_per_node(
    plan: Plan, nodes: Nodes | None, emulates_links: bool = False
) -> tuple[int, ...]:
    """Ranks of each node, in order; raises InputError when the plan wants other nodes.

    A plan for one node may be spread evenly over several, which then have more between them than
    was planned for. Where links are emulated, all ranks are on this machine.
    """
    if emulates_links:
        return (plan.phase.mesh.world,)
    planned = tuple(
        pool.devices_per_node for pool in plan.cluster.pools for _ in range(pool.num_nodes)
    )
    num = nodes.num if nodes is not None else 1
    if len(planned) == num:
        return planned
    world = plan.phase.mesh.world
    if len(planned) == 1 and world % num == 0:
        return (world // num,) * num
    names = ", ".join(dict.fromkeys(pool.device.name for pool in plan.cluster.pools))
    if len(planned) == 1:
        raise InputError("nnodes", num, f"does not divide the {world} x {names} of the plan",
                         "give a divisor, or plan for these nodes")  # fmt: skip
    if any(pool.on_one_machine for pool in plan.cluster.pools):
        raise InputError("gpus", plan.cluster.name, "its nodes are processes of one machine",
                         "add --emulate-links, which holds the rate between them")  # fmt: skip
    raise InputError("gpus", f"{world} x {names}",
                     f"planned for {len(planned)} nodes, and this is {num}",
                     f"run it on each with --nnodes {len(planned)} --node-rank I --rendezvous "
                     "HOST:PORT, or plan again for one node, such as --gpus 2xcpu")  # fmt: skip


def check_nodes(nodes: Nodes | None) -> None:
    """Raise InputError for a place or a rendezvous that cannot be."""
    if nodes is None:
        return
    if not 0 <= nodes.node < nodes.num:
        raise InputError("node-rank", nodes.node, f"is no place among {nodes.num} nodes",
                         f"give 0 to {nodes.num - 1}")  # fmt: skip
    host, port = host_and_port(nodes)
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise InputError("rendezvous", nodes.rendezvous, f"unknown host ({error.strerror})",
                         "give the address of node 0") from error  # fmt: skip
    if nodes.node == 0:
        _check_port_free(nodes.rendezvous, port)


def host_and_port(nodes: Nodes) -> tuple[str, int]:
    """The two parts of a rendezvous."""
    host, _, port = nodes.rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError("rendezvous", nodes.rendezvous, "is not HOST:PORT",
                         "write node 0's address and a free port, such as node0:29500")  # fmt: skip
    return host.strip("[]"), int(port)


def _check_port_free(rendezvous: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError("rendezvous", rendezvous, f"the port is in use ({error.strerror})",
                             "give another port") from error  # fmt: skip


def own_address(nodes: Nodes) -> str:
    """The address of this machine that the rendezvous, and so the other nodes, can reach."""
    host, port = host_and_port(nodes)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: the system only chooses the way
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface with an address; None where the system does not say."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def num_cuda_devices() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()


def check_memory(plan_file: PlanFile, device: str, num_ranks: int) -> None:
    """Raise RunFailed when the predicted peaks of this machine's ranks exceed what is free."""
    if device != "cpu":
        return
    predicted_bytes = plan_file.estimate.peak_memory_bytes.median
    available_bytes = failures.available_bytes()
    if predicted_bytes * num_ranks > available_bytes:
        raise RunFailed(
            f"memory={format_bytes(predicted_bytes * num_ranks)}: predicted for {num_ranks} ranks, "
            f"but {format_bytes(available_bytes)} are free "
            f"({predicted_bytes * num_ranks:.0f} against {available_bytes} bytes); "
            "lower --micro-batch, use --recompute full, or free memory"
        )


def check_base(plan: Plan, base: Path | None) -> None:
    """Raise InputError where the frozen weights of a plan cannot be those of a folder."""
    if base is None:
        return
    if not plan.phase.technique("lora"):
        raise InputError("base", base, "all weights of the plan train, and none is frozen",
                         "plan with --lora RANK, or go on from it with --resume")  # fmt: skip
    folder.check_base(base, plan.model)


def check_offload(plan_file: PlanFile, folder: Path | None) -> None:
    """Raise InputError when what is to be offloaded has no room: in the host's memory as the
    cluster gives it, or on the disk of its folder."""
    away = plan_file.estimate.bytes_off_device
    plan = plan_file.plan
    pool = plan.cluster.pools[0]
    ranks = min(pool.devices_per_node, plan.phase.mesh.world)
    needed = away.get("host", 0.0) * ranks
    budget = pool.host_memory_bytes
    if budget is not None and needed > budget:
        raise InputError("host-memory", format_bytes(budget),
                         f"offload needs {format_bytes(needed)} on a node of {ranks} ranks, "
                         f"{format_bytes(needed - budget)} more",
                         "offload less, use tier=disk, or raise --host-memory")  # fmt: skip
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError("offload-dir", str(folder), "no folder that can be written to",
                         "give one that exists")  # fmt: skip
    where = folder or Path(tempfile.gettempdir())
    on_files = away.get("disk", 0.0) + (away.get("host", 0.0) if pool.device.kind == "cpu" else 0.0)
    free = shutil.disk_usage(where).free if on_files else math.inf
    if on_files * ranks > free:
        raise RunFailed(
            f"offload-dir={where}: the disk is full: offload needs "
            f"{format_bytes(on_files * ranks)}, {format_bytes(free)} are free; "
            "free some, give another --offload-dir, or offload less"
        )


def check_training(plan: Plan, steps: int | None, training: job.Training) -> None:
    """Raise InputError for a training that cannot be, or that is done already."""
    from .checkpoints import folder
    from .metrics import check_tensorboard

    away = plan.phase.technique("offload").get("states")
    if away == "optimizer" and (training.checkpoint or training.resume):
        problem = "moments off the device are not in checkpoints yet"
        raise InputError("offload", "optimizer", problem,
                         "drop --checkpoint and --resume, or offload activations")  # fmt: skip
    for name, value in (("every", training.every), ("keep", training.keep)):
        if value < 1:
            raise InputError(name, value, "not positive", "give 1 or more")
    if training.tensorboard is not None:
        check_tensorboard(Path(training.tensorboard))
    own, source = training.checkpoint, training.resume
    if own is not None and source != own:
        folder.check_fresh(Path(own))
    if source is None:
        return
    step = folder.check_resumable(Path(source), plan.model)
    if step == 0 and source != own:
        raise InputError("resume", source, "holds no checkpoint",
                         "give a folder that --checkpoint wrote")  # fmt: skip
    if steps is not None and step >= steps:
        raise InputError("steps", steps, f"the checkpoint in {source} is of step {step}",
                         "give more --steps to go on")  # fmt: skip
