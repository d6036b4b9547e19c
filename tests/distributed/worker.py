"""One rank of a group that runs families in turn: worker.py RANK WORLD FOLDER quick|slow."""

from __future__ import annotations

import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import families

from forerun.executors.build import build


def run_family(model: str, family: str, world: int) -> dict[str, Any]:
    """What one family gives on this rank, or the traceback of what went wrong."""
    try:
        plan = families.plan_of(world, model, family)
        return families.train(build(plan, device=torch.device("cpu")))
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    slow = sys.argv[4] == "slow"
    every = families.names(world, slow) + families.expert_names(world, slow)
    for index, (model, family) in enumerate(every):
        # Each family has its own groups: those of all together would have hundreds of threads.
        store = f"file://{folder}/store{index}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        results[model, family] = run_family(model, family, world)
        if "error" in results[model, family]:
            break  # the other ranks may be out of step from here on
        dist.destroy_process_group()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
