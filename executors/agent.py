"""Starts the ranks of one machine by torch's elastic launch, and again when one is lost.

`python -m forerun.executors.agent FOLDER` reads `launch.json` there. It is what torchrun does, from
Python, so that the way each process ended can be told to the parent as data. When one rank ends
badly, the others are ended too, and all start again as often as `max_restarts` allows; on several
nodes the agents meet at the rendezvous and restart together. On Linux the kernel ends the agent
when the parent is gone, and the ranks when the agent is.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .. import document
from . import job
from .processes import die_with_parent

JOIN_TIMEOUT_S = 600
"""How long the nodes of a run wait for one another."""


def main(folder: Path) -> int:
    """Run the ranks to their end; 0, or 1 with their exit codes written into the folder."""
    die_with_parent()
    launch = document.read(job.Launch, folder / job.LAUNCH)
    os.environ[job.NODE] = str(launch.node)
    if launch.num_nodes > 1:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see worker.meeting_place
    config = LaunchConfig(
        min_nodes=launch.num_nodes,
        max_nodes=launch.num_nodes,
        nproc_per_node=launch.num_ranks,
        run_id=folder.name if launch.num_nodes == 1 else "forerun",
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rendezvous,
        rdzv_configs={} if launch.num_nodes == 1 else {
            "is_host": launch.node == 0,
            "join_timeout": JOIN_TIMEOUT_S,
            "read_timeout": JOIN_TIMEOUT_S,
        },
        local_addr=launch.address,
        max_restarts=launch.max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )  # fmt: skip
    module = (launch.module,) if launch.module is not None else ()
    worker = ("-u", "-m", "forerun.executors.worker", str(folder), *module)
    try:
        elastic_launch(config, sys.executable)(*worker)
    except ChildFailedError as error:
        exits = [
            job.Exit(rank=rank, exit_code=failure.exitcode)
            for rank, failure in sorted(error.failures.items())
        ]
        document.write_bytes(folder / job.EXITS, document.to_json(exits))
        return 1
    except Exception:
        traceback.print_exc()  # the parent reads the last line of it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
