"""One rank of a group that runs families, and checkpoints, in turn: worker.py RANK WORLD FOLDER
SELECTION."""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import expert_families
import families
import low_precision
import modules
import pairs
import resumption
import selections

from forerun.executors.build import build
from forerun.executors.torch_compat import destroy_process_groups
from forerun.plan import Plan

Task = Callable[[], dict[str, Any]]


def run_family(plan: Plan, steps: int) -> dict[str, Any]:
    """What one family gives on this rank."""
    return families.train(build(plan, device=torch.device("cpu")), steps)


def run_pair(first: str, second: str) -> dict[str, Any]:
    """What a plan of two techniques gives on this rank."""
    plan = pairs.plan_of(first, second)
    return families.train(build(plan, device=torch.device("cpu")), selections.STEPS["quick"])


def tasks(world: int, folder: Path, selection: str) -> dict[tuple[str, str], Task]:
    """What this rank does, by (model, what): a selection of `quick`, `slow` and `pairs`."""
    if selection == "pairs":
        return {pair: partial(run_pair, *pair) for pair in pairs.executed()}
    slow = selection == "slow"
    steps = selections.STEPS[selection]
    found: dict[tuple[str, str], Task] = {
        name: partial(run_family, kind.plan_of(world, *name), steps)
        for kind in (families, expert_families)
        for name in kind.names(world, slow)
    }
    found |= {
        (model, family): partial(low_precision.run, family, world)
        for model, family in low_precision.names(world, slow)
    }
    found |= resumption.tasks(world, folder, slow)
    return found | modules.tasks(world, folder, slow)


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for index, (name, task) in enumerate(tasks(world, folder, sys.argv[4]).items()):
        # Each has its own groups: those of all together would have hundreds of threads.
        store = f"file://{folder}/store{index}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        try:
            results[name] = task()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the other ranks may be out of step from here on
        destroy_process_groups()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
