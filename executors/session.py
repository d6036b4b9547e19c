"""Ranks that start once and run plan after plan: what `tune` saves against a run for each.

Starting processes and importing torch takes seconds, more than the steps of a small plan. Between
two plans the process group is taken down, the caches are emptied and peaks forgotten. A plan that
fails ends the processes; the next one starts others.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from .. import document
from ..plan import PlanFile
from . import failures, job, launch, machine
from .measure.report import RankResult
from .processes import kill_tree
from .support import check_executed

END_S = 10.0
"""What ranks get to end by themselves."""


class Session:
    """The processes of plans of one size on one kind of device; a context manager."""

    def __init__(self, data: str | None = None, module: str | None = None) -> None:
        """`data` takes the place of the workload's, `module` is as in `launch.run`."""
        self.data, self.module = data, module
        self._shape: tuple[int, str] | None = None
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(politely=error is None)

    def run(
        self,
        plan_file: PlanFile,
        *,
        steps: int,
        warmup_steps: int,
        counted: bool = True,
        profiled_steps: int = 2,
        on_progress: launch.OnProgress | None = None,
    ) -> list[RankResult]:
        """What each rank measured of a plan; only the steps' times unless `counted`.

        Raises as `launch.run` does; the session goes on with new processes then.
        """
        plan = plan_file.plan
        plan.check()
        device = machine.check_machine(plan)
        machine.check_module(plan, self.module)
        check_executed(plan)
        world = plan.phase.mesh.world
        machine.check_memory(plan_file, device, world)
        if self._shape != (world, device) or self._process is None:
            self.close()
            self._start(plan_file, world, device)
        assert self._folder is not None and self._process is not None
        place = job.item(self._folder, self._number)
        self._number += 1
        place.mkdir()
        work = job.Job(plan=plan, device=device, warmup_steps=warmup_steps, steps=steps,
                       counted=counted, profiled_steps=profiled_steps)  # fmt: skip
        document.write(place / job.JOB, work)
        try:
            return self._results(place, plan_file, on_progress)
        except BaseException:
            self.close(politely=False)
            raise

    def close(self, politely: bool = True) -> None:
        """End the processes; politely, once they are between two plans."""
        if self._process is not None and self._folder is not None:
            try:
                (self._folder / job.STOP).touch()
                if politely:
                    self._process.wait(END_S)
            except (OSError, subprocess.TimeoutExpired):
                pass  # killed below
            finally:
                kill_tree(self._process)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._folder = self._shape = None

    def _start(self, plan_file: PlanFile, world: int, device: str) -> None:
        self._folder = launch.make_folder()
        text = launch.text_of(plan_file.plan, self.data)
        document.write_bytes(self._folder / job.CORPUS, text)
        started = job.Launch(num_ranks=world, module=self.module, session=True)
        document.write(self._folder / job.LAUNCH, started)
        self._process = launch.start_agent(self._folder, started, device)
        self._shape, self._number = (world, device), 0

    def _results(
        self, place: Path, plan_file: PlanFile, on_progress: launch.OnProgress | None
    ) -> list[RankResult]:
        assert self._process is not None and self._folder is not None
        names = [job.result_name(rank) for rank in range(plan_file.plan.phase.mesh.world)]
        oom_kills = failures.num_oom_kills()

        def is_over() -> bool:
            return all((place / name).exists() for name in names)

        step = launch.follow(self._process, place / job.PROGRESS, None, on_progress, None, is_over)
        if not is_over():
            self._process.wait()
            for path in self._folder.glob(job.EXITS):
                shutil.copyfile(path, place / job.EXITS)
            raise failures.explain(
                place, plan_file, step, failures.num_oom_kills() > oom_kills, logs=self._folder
            )
        return [document.read(RankResult, place / name) for name in names]
