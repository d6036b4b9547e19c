"""Where a rank stands: its number, its device, and how it meets the others."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # public names, which its module does not list
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from .. import document
from ..costmodel.diff import plan_digest
from ..errors import InputError
from ..plan import Plan
from . import job
from .measure.report import RankResult

STORE_TIMEOUT_S = 600
"""How long ranks wait for one another when they start."""


def own_rank(ranks_per_node: tuple[int, ...]) -> int:
    """This rank: nodes count in the order that the user gave them, not in which they came."""
    if not ranks_per_node:
        return int(os.environ["RANK"])
    return sum(ranks_per_node[: int(os.environ[job.NODE])]) + int(os.environ["LOCAL_RANK"])


def meeting_place(ranks_per_node: tuple[int, ...], name: str = "") -> Store:
    """The store through which the ranks of this attempt find one another, for the `name`-th time.

    On one node the agent keeps its store over restarts, and in it the addresses of dead ranks: each
    attempt has names of its own. On several nodes, which count their attempts apart, the rank that
    torch calls the first opens a new store each time.
    """
    opens = bool(ranks_per_node) and os.environ["RANK"] == "0"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=opens,
        timeout=datetime.timedelta(seconds=STORE_TIMEOUT_S),
    )
    attempt = "" if ranks_per_node else os.environ.get(job.ATTEMPT, "0")
    return PrefixStore(f"attempt-{attempt}/{name}", store)


def start_process_group(work: job.Job, name: str = "") -> torch.device:
    """The device of this rank, with the default process group over all ranks."""
    known: dict[str, Any] = {
        "store": meeting_place(work.ranks_per_node, name),
        "rank": own_rank(work.ranks_per_node),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }
    if work.device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **known)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **known)
    return device


def check_nodes(work: job.Job) -> None:
    """Raise InputError unless every node was given the same plan."""
    if not work.ranks_per_node:
        return
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, plan_digest(work.plan))
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise InputError("plan", digest[:12], f"rank {rank} was given another plan than rank 0 "
                             f"({digests[0][:12]})", "give every node the same file")  # fmt: skip


def check_device(plan: Plan, device: torch.device) -> None:
    """Raise InputError for a dtype that the device does not compute in."""
    if device.type != "cuda":
        return
    if plan.phase.compute_dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise InputError("precision", "bf16", f"{torch.cuda.get_device_name(device)} has no bf16",
                         "plan again with --precision fp32")  # fmt: skip


def of_all_nodes(result: RankResult) -> list[RankResult]:
    """Every rank's result on the first rank of each node, nothing on the others."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, document.to_json(result))
    if os.environ["LOCAL_RANK"] != "0":
        return []
    return [document.from_json(RankResult, raw, "a rank's result") for raw in everyone]
