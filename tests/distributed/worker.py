"""One rank of a group that runs families, and checkpoints, in turn: worker.py RANK WORLD FOLDER
quick|slow."""

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
import modules
import resumption

from forerun.executors.build import build


def run_family(model: str, family: str, world: int) -> dict[str, Any]:
    """What one family gives on this rank, or the traceback of what went wrong."""
    try:
        settings = families.FAMILIES[world][family]
        plan = families.make_plan(families.MODELS[model], **settings)
        return families.train(build(plan, device=torch.device("cpu")))
    except Exception:
        return {"error": traceback.format_exc()}


def run_families(world: int, slow: bool) -> dict[tuple[str, str], dict[str, Any]]:
    """The results of this rank, by (model, family)."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for model, family in families.names(world, slow):
        results[model, family] = run_family(model, family, world)
        if "error" in results[model, family]:
            break  # the other ranks may be out of step from here on
    return results


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    slow = sys.argv[4] == "slow"
    results = run_families(world, slow)
    results |= resumption.run_all(world, folder, slow)
    if not slow:
        results |= modules.run_all(world, folder)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
