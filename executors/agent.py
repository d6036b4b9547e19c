"""Starts the ranks of one machine by torch's elastic launch, without restarts.

`python -m forerun.executors.agent FOLDER NUM_RANKS [MODULE]`, where MODULE names the function that
makes a user's module. It is what torchrun does, from Python, so that
the way each process ended can be told to the parent as data. When one rank ends badly, the others
are ended too. On Linux the kernel ends the agent when the parent is gone, and the ranks when the
agent is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .. import document
from . import job
from .processes import die_with_parent


def main(folder: Path, num_ranks: int, *module: str) -> int:
    """Run the ranks to their end; 0, or 1 with their exit codes written into the folder."""
    die_with_parent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )
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
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
