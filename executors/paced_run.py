"""The steps of one paced rank: real ones first, which set the scale, then paced ones, then one that
is counted.
"""

from __future__ import annotations

import os
import statistics

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .data import Rows
from .measure import environment
from .measure.report import RankResult
from .pacing import Board, Pace, Pacer, Stopwatch
from .worker import Run, leave

MARGIN = 2.0
"""How much longer paced chunks last than the real ones did in the median, or more."""
CHUNK_S = 0.010
"""Mean length of paced chunks at least, per process and core; what comes between them, Python and
messages, takes some 0.2 ms."""
CHUNK_MESSAGES = 5
"""Real messages that a mean paced chunk is as long as, or more: a rank must not wait for them."""
MOST_STEP_S = 60.0
"""On the wall."""


class PacedRun(Run):
    """A run whose chunks last as long as predicted for another device."""

    def measure(self) -> list[RankResult]:
        """Train some steps for real and some paced, then count one."""
        pace, marks = self.work.pace, self.trainer.marks
        assert pace is not None
        load_at_start = os.getloadavg()[0]
        chunks = pace.chunks[self.trainer.coordinates["pp"]]
        loss: list[float] = []
        steps_s: list[float] = []
        terms: list[dict[str, float]] = []
        late_s = 0.0
        for _ in range(max(2, self.work.warmup_steps)):
            marks.tempo = stopwatch = Stopwatch()
            loss.append(self.train_step()[1])
        scale = pace.scale or self._scale(pace, chunks, stopwatch)
        board = self._board()
        pacer = marks.tempo = Pacer(chunks, pace.hop_s, scale, board)
        forward_backward = self.trainer.forward_backward

        def paced(tokens_BS1: Tensor | Rows) -> Tensor:
            pacer.begin_step()
            board.post(f"begin.{self.trainer.coordinates['pp']}", pacer.begun_s)
            return forward_backward(tokens_BS1)

        self.trainer.forward_backward = paced
        for _ in range(self.work.steps or 0):
            _, mean_loss, _ = self.train_step()
            begun_s = min(board.read(f"begin.{rank}") for rank in range(self.trainer.mesh.pp))
            steps_s.append((pacer.ended_s - begun_s) / scale)
            loss.append(mean_loss)
            terms.append(self._own_terms(pacer.end_step()))
            late_s = max(late_s, pacer.late_s / scale)
        del self.trainer.forward_backward
        marks.tempo = Stopwatch()
        live, counter = self.count_step()
        live_bytes = live.peak()
        late = torch.tensor(late_s / statistics.median(steps_s))
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        names = sorted({name for row in terms for name in row})
        result = RankResult(
            rank=dist.get_rank(),
            coordinates=self.trainer.coordinates,
            steps_s=tuple(steps_s),
            loss=tuple(loss),
            peak_memory_bytes=sum(live_bytes.values()),
            process_peak_bytes=environment.process_peak_bytes(self.device, self.context_bytes),
            context_bytes=self.context_bytes,
            live_bytes=live_bytes,
            profiled_s={n: statistics.fmean(row.get(n, 0.0) for row in terms) for n in names},
            bytes_on_wire=counter.bytes_on_wire(),
            environment=environment.environment(load_at_start, self.device)
            | {
                "emulated_device": pace.device,
                "pace_scale": f"{scale:.6g}",
                "pace_late": f"{float(late):.4f}",
                "simulated_step_s": f"{pace.step_s:.6g}",
            },
        )
        leave()
        return [result]

    def _board(self) -> Board:
        """What the ranks of this rank's pipeline show each other."""
        phase, place = self.work.plan.phase, self.trainer.coordinates
        names = [
            f"{kind}{stage}.{micro}"
            for kind in "FB"
            for stage in range(phase.mesh.num_stages)
            for micro in range(phase.num_microbatches)
        ]
        names += [f"begin.{rank}" for rank in range(phase.mesh.pp)]
        replica = "-".join(str(place[axis]) for axis in phase.mesh.AXES if axis != "pp")
        return Board(self.progress.path.parent / f"board-{replica}", names)

    def _own_terms(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms of a step; without a pipeline a rank that waits does so for its host."""
        if self.trainer.pipeline is None:
            terms["host"] = terms.get("host", 0.0) + terms.pop("bubble", 0.0)
        return terms

    def _scale(self, pace: Pace, chunks: dict[str, dict[str, float]], real: Stopwatch) -> float:
        """The same scale on all ranks, by which predicted chunks are long against real work."""
        predicted_s = {key: sum(terms.values()) for key, terms in chunks.items()}
        real_s = {key: statistics.median(taken) for key, taken in real.taken_s.items()}
        seen = [key for key in real_s if key != "U" and predicted_s.get(key, 0.0) > 0]
        whole_s = sum(predicted_s[key] * len(real.taken_s[key]) for key in seen)
        slowest = sum(real_s[key] * len(real.taken_s[key]) for key in seen) / max(whole_s, 1e-12)
        per_core = max(1.0, self.trainer.mesh.world / (os.cpu_count() or 1))
        mean_s = statistics.fmean(predicted_s[key] for key in seen) if seen else 1.0
        pipeline = self.trainer.pipeline
        message_s = pipeline.message_s() if pipeline is not None else 0.0
        shortest_s = max(CHUNK_S * per_core, CHUNK_MESSAGES * message_s)
        both = torch.tensor([MARGIN * slowest, shortest_s / mean_s])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        needed, wanted = both.tolist()
        if needed * pace.step_s > MOST_STEP_S:
            raise InputError("pace", self.work.plan.model.name,
                             f"its real work is so slow here that a paced step would take "
                             f"{needed * pace.step_s:.0f} s", "plan a smaller model of the same "
                             "layers, or give --pace-scale")  # fmt: skip
        return min(max(needed, wanted), MOST_STEP_S / pace.step_s)
