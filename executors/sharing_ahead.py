"""The groups of the next steps, worked out in a process of their own while a step runs.

    python -m forerun.executors.sharing_ahead FIRST_STEP < plan.json > one line of JSON per step

Rank 0 starts it and reads a line per step; the pipe holds a few steps, then the process waits. The
others get the line from rank 0. What a step is depends on the plan alone, so that all runs of a plan
share sequences out alike.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from typing import Any

import msgspec
import torch.distributed as dist

from ..costmodel.unequal import GroupPass, Step
from ..document import to_json
from ..errors import InputError, RunFailed
from ..plan import Plan


class Answer(msgspec.Struct):
    """The passes of one step, or why there are none."""

    step: int
    passes: tuple[GroupPass, ...] = ()
    error: str = ""


class Ahead:
    """Steps in turn, from any step on; all ranks ask for the same ones."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.next_step = -1
        self.process: subprocess.Popen[bytes] | None = None
        # answers are plain bytes: they go over a backend for those, whatever carries tensors
        self.group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def step(self, step: int) -> Step:
        """The passes of a step (collective)."""
        line = [self._read(step) if dist.get_rank() == 0 else b""]
        dist.broadcast_object_list(line, group=self.group)
        answer = msgspec.json.decode(line[0], type=Answer)
        if answer.error:
            raise RunFailed(f"groups of step {step}: {answer.error}")
        return answer.passes

    def _read(self, step: int) -> bytes:
        if self.process is None or step != self.next_step:
            self.close()
            self.process = _start(self.plan, step)
            weakref.finalize(self, _stop, self.process)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.next_step = step + 1
        if not line:
            why = f"the process that works them out ended with {self.process.wait()}"
            return msgspec.json.encode(Answer(step, error=why))
        return line

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            _stop(self.process)
            self.process = None


def _start(plan: Plan, step: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "forerun.executors.sharing_ahead", str(step)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(to_json(plan))
    process.stdin.close()
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def main(first: int) -> None:
    """Write a line per step until nobody reads them."""
    from ..document import from_json
    from ..planner.unequal import Sharing
    from .processes import die_with_parent

    die_with_parent()
    plan = from_json(Plan, sys.stdin.buffer.read(), "standard input")
    step = first
    try:
        sharing = Sharing.of(plan)
        while True:
            _write(Answer(step, sharing.step(step)))
            step += 1
    except BrokenPipeError:
        return
    except (InputError, RunFailed) as error:
        _write(Answer(step, error=str(error)))


def _write(answer: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
