"""Whole training steps of a negligible model, by the real trainer, timed on the host.

The model is so small that its operators cost next to nothing: what a step takes is Python, autograd
and dispatch. On a CPU the clock is this thread's processor time, so that waiting for a collective's
partner does not count; beside a GPU it is the wall's, because autograd launches from a thread of
its own and the device is done with each operator before the next is launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from ...catalogs import load_cluster
from ...experts import Experts
from ...lengths import Lengths
from ...mesh import Mesh
from ...model import Layer, Model
from ...plan import Phase, Plan, Setting, even_stages, techniques
from ...workload import Workload
from ..data import Rows

if TYPE_CHECKING:
    from ..trainer import Trainer

SEQ, HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB = 4, 32, 2, 16, 64, 256
STEPS = 16
FEW, MANY = 2, 6
"""Layers of the two models whose difference tells the time of one layer."""
ALONE = Mesh()
EXPERTS = Experts(num_experts=4, top_k=2, ffn_hidden=FFN)
CPU = torch.device("cpu")


def tiny_plan(
    num_layers: int,
    *,
    mesh: Mesh = ALONE,
    zero: Literal[0, 1, 2, 3] = 0,
    sequence_parallel: bool = False,
    recompute: str = "none",
    compute: str = "fp32",
    runtime: str = "eager",
    num_microbatches: int = 1,
    experts: Experts | None = None,
    documents: bool = False,
) -> Plan:
    """A plan for a model of `num_layers` negligible layers, one sequence per micro-batch; with
    `documents` each token is one."""
    layer = Layer(
        repeat=num_layers, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, ffn_hidden=FFN,
        experts=experts,
    )  # fmt: skip
    chosen = techniques(compute, recompute)
    if runtime != "eager":
        chosen["runtime"] = {"mode": runtime}
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
        settings=(Setting(layers=(0, num_layers - 1), techniques=chosen),),
    )
    return Plan(
        model=Model(name="negligible", hidden=HIDDEN, vocab=VOCAB, layers=(layer,)),
        cluster=load_cluster(f"{mesh.world}xcpu"),
        workload=Workload(
            seq_tokens=SEQ,
            global_batch_seqs=num_microbatches * mesh.dp,
            lengths=Lengths.of("tokens", [1], "made up") if documents else None,
        ),
        phases=(phase,),
    )


class HostTimes:
    """An observer that adds up a clock's time between begin and end, by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """A piece of work begins."""
        self.began[name] = self.clock()

    def end(self, name: str) -> None:
        """It ends."""
        spent = self.clock() - self.began[name]
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


class TimedTrainer:
    """A real trainer of a tiny plan, and the host time of its steps by part."""

    def __init__(self, plan: Plan, device: torch.device = CPU) -> None:
        from ..build import build

        self.device = device
        self.clock = time.thread_time if device.type == "cpu" else time.perf_counter
        self.trainer: Trainer = build(plan, device=device)
        count = plan.phase.num_microbatches * plan.phase.micro_batch_seqs
        tokens = torch.arange(count * (SEQ + 1)).remainder(VOCAB).view(count, SEQ + 1)
        self.rows = Rows.of(tokens.to(device))
        if plan.workload.lengths is not None:
            self.rows = self.rows._replace(documents_BN=torch.arange(1, SEQ + 1).repeat(count, 1))
        self.samples: list[dict[str, float]] = []

    def step(self) -> None:
        """One step; its times are kept."""
        times = HostTimes(self.clock)
        self.trainer.observer = times
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = self.clock()
        self.trainer.forward_backward(self.rows)
        self.trainer.optimizer_step()
        times.seconds["total"] = self.clock() - start
        self.samples.append(times.seconds)

    def typical(self, name: str) -> float:
        """Lower quartile of the seconds of one part of the step, or of its total.

        Not the median: differences of many samples are taken, and disturbances only add time.
        """
        kept = sorted(sample[name] for sample in self.samples[2:])  # the first make the buffers
        return kept[len(kept) // 4]


def run_interleaved(
    plans: dict[str, Plan], device: torch.device = CPU, steps: int = STEPS
) -> dict[str, TimedTrainer]:
    """Trainers of all plans after `steps` steps of each, taken in turns."""
    trainers = {name: TimedTrainer(plan, device) for name, plan in plans.items()}
    for _ in range(steps):
        for trainer in trainers.values():
            trainer.step()
    return trainers


def per_layer_s(few: TimedTrainer, many: TimedTrainer, name: str) -> float:
    """Seconds of one part of a step per layer, from models of `FEW` and of `MANY` layers."""
    return (many.typical(name) - few.typical(name)) / (MANY - FEW)
