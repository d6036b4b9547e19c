"""Whole training steps of a negligible model, by the real trainer, timed by the thread's own clock.

The model is so small that its operators cost next to nothing: what a step takes is Python, autograd
and dispatch. The clock is this thread's processor time, so that waiting for a collective's partner
does not count.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import torch

from ...catalogs import load_cluster
from ...experts import Experts
from ...mesh import Mesh
from ...model import Layer, Model
from ...plan import Phase, Plan, Setting, even_stages, techniques
from ...workload import Workload

if TYPE_CHECKING:
    from ..trainer import Trainer

SEQ, HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB = 4, 32, 2, 16, 64, 256
STEPS = 16
ALONE = Mesh()
EXPERTS = Experts(num_experts=4, top_k=2, ffn_hidden=FFN)


def tiny_plan(
    num_layers: int,
    *,
    mesh: Mesh = ALONE,
    zero: Literal[0, 1, 2, 3] = 0,
    sequence_parallel: bool = False,
    recompute: str = "none",
    num_microbatches: int = 1,
    experts: Experts | None = None,
) -> Plan:
    """A plan for a model of `num_layers` negligible layers, one sequence per micro-batch."""
    layer = Layer(
        repeat=num_layers, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, ffn_hidden=FFN,
        experts=experts,
    )  # fmt: skip
    phase = Phase(
        steps=1,
        seq_tokens=SEQ,
        micro_batch_seqs=1,
        num_microbatches=num_microbatches,
        mesh=mesh,
        zero=zero,
        sequence_parallel=sequence_parallel,
        schedule="gpipe",
        stages=even_stages(num_layers, mesh.num_stages, "cpu"),
        settings=(Setting(layers=(0, num_layers - 1), techniques=techniques("fp32", recompute)),),
    )
    return Plan(
        model=Model(name="negligible", hidden=HIDDEN, vocab=VOCAB, layers=(layer,)),
        cluster=load_cluster(f"{mesh.world}xcpu"),
        workload=Workload(seq_tokens=SEQ, global_batch_seqs=num_microbatches * mesh.dp),
        phases=(phase,),
    )


class ThreadTimes:
    """An observer that adds up this thread's processor time between begin and end, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """A piece of work begins."""
        self.began[name] = time.thread_time()

    def end(self, name: str) -> None:
        """It ends."""
        spent = time.thread_time() - self.began[name]
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


class TimedTrainer:
    """A real trainer of a tiny plan, and the thread time of its steps by part."""

    def __init__(self, plan: Plan) -> None:
        from ..build import build

        self.trainer: Trainer = build(plan, device=torch.device("cpu"))
        count = plan.phase.num_microbatches * plan.phase.micro_batch_seqs
        self.tokens = torch.arange(count * (SEQ + 1)).remainder(VOCAB).view(count, SEQ + 1)
        self.samples: list[dict[str, float]] = []

    def step(self) -> None:
        """One step; its times are kept."""
        times = ThreadTimes()
        self.trainer.observer = times
        start = time.thread_time()
        self.trainer.forward_backward(self.tokens)
        self.trainer.optimizer_step()
        times.seconds["total"] = time.thread_time() - start
        self.samples.append(times.seconds)

    def typical(self, name: str) -> float:
        """Lower quartile of the seconds of one part of the step, or of its total.

        Not the median: differences of many samples are taken, and disturbances only add time.
        """
        kept = sorted(sample[name] for sample in self.samples[2:])  # the first make the buffers
        return kept[len(kept) // 4]


def run_interleaved(plans: dict[str, Plan], steps: int = STEPS) -> dict[str, TimedTrainer]:
    """Trainers of all plans after `steps` steps of each, taken in turns."""
    trainers = {name: TimedTrainer(plan) for name, plan in plans.items()}
    for _ in range(steps):
        for trainer in trainers.values():
            trainer.step()
    return trainers
