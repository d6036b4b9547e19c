"""Host times beside the operators, and the memory of a process.

Each is the time of something real at a negligible size - a decoder block, a recomputed block, a
block under FSDP2 or tensor parallelism, a pipeline action, a whole step, all by the real trainer -
minus the operators and the calls of collectives in it, measured at that size in the same process.
What is left is Python, autograd and dispatch, which a step of any size pays once per block, unit or
action.

Per block, times are differences between models of few and of many layers, so that what a step
pays once falls out.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...mesh import Mesh
from . import steps
from .operators import BENCHES, engine_start_s
from .steps import (
    FEW,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MANY,
    SEQ,
    VOCAB,
    TimedTrainer,
    per_layer_s,
    tiny_plan,
)
from .timing import Buffers, Clock, median


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes() -> float:
    """Resident memory of this process."""
    import psutil

    return float(psutil.Process().memory_info().rss)


class OperatorTimes:
    """Times of the operators of the negligible model, forward and backward."""

    def __init__(self, buffers: Buffers, clock: Clock) -> None:
        self.buffers, self.clock = buffers, clock
        self.engine_s = engine_start_s(clock, buffers.device)

    def of(self, name: str, *size: int) -> tuple[float, float]:
        """(forward_s, backward_s) of one operator."""
        bench = BENCHES[name]
        case = bench.prepare(self.buffers, size)
        forward = median(self.clock.samples(case.forward, 0.01))
        if case.backward is None:
            return forward, 0.0
        backward = median(self.clock.samples(case.backward(), 0.01))
        return forward, max(0.0, backward - (self.engine_s if bench.engine else 0.0))

    def linear(self, n: int, k: int) -> tuple[float, float]:
        """A linear layer: its backward is the gradients of input and weight."""
        forward, backward = self.of("linear", SEQ, n, k)
        return forward, backward + self.of("linear_wgrad", SEQ, n, k)[0]

    def block(self) -> tuple[float, float]:
        """All operators of one block, as the cost model counts them."""
        width = HEADS * HEAD_DIM
        add = self.of("add", SEQ * HIDDEN)[0]
        return _sum([
            (2, self.of("rmsnorm", SEQ, HIDDEN)),
            (3, self.linear(width, HIDDEN)),
            (1, self.linear(HIDDEN, width)),
            (2, self.linear(FFN, HIDDEN)),
            (1, self.linear(HIDDEN, FFN)),
            (2, self.of("rope", SEQ * width)),
            (1, self.of("attention", HEADS, SEQ, HEAD_DIM)),
            (1, self.of("swiglu", SEQ * FFN)),
            (2, (add, 0.0)),
            (5, (0.0, add)),  # where a tensor has several users, their gradients are summed
        ])  # fmt: skip

    def expert_block(self) -> tuple[float, float]:
        """All operators of one block with routed experts in the place of its MLP."""
        e, width = steps.EXPERTS, HEADS * HEAD_DIM
        rows, add = SEQ * e.top_k, self.of("add", SEQ * HIDDEN)[0]
        return _sum([
            (2, self.of("rmsnorm", SEQ, HIDDEN)),
            (3, self.linear(width, HIDDEN)),
            (1, self.linear(HIDDEN, width)),
            (2, self.of("rope", SEQ * width)),
            (1, self.of("attention", HEADS, SEQ, HEAD_DIM)),
            (1, self.linear(e.num_experts, HIDDEN)),
            (1, self.of("routing", SEQ, e.num_experts)),
            (1, self.of("permute", SEQ * HIDDEN, e.top_k)),
            (2, self.of("grouped_linear", rows, FFN, HIDDEN, e.num_experts)),
            (1, self.of("swiglu", rows * FFN)),
            (1, self.of("grouped_linear", rows, HIDDEN, FFN, e.num_experts)),
            (1, self.of("unpermute", SEQ * HIDDEN, e.top_k)),
            (2, (add, 0.0)),
            (6, (0.0, add)),
        ])  # fmt: skip

    def ends_s(self) -> float:
        """Forward and backward of the operators of embedding, final norm, head and loss."""
        return sum(_sum([
            (1, self.of("embedding", SEQ, HIDDEN, VOCAB)),
            (1, self.of("rmsnorm", SEQ, HIDDEN)),
            (1, self.linear(VOCAB, HIDDEN)),
            (1, self.of("cross_entropy", SEQ, VOCAB)),
        ]))  # fmt: skip


def _sum(parts: list[tuple[int, tuple[float, float]]]) -> tuple[float, float]:
    return (
        sum(count * times[0] for count, times in parts),
        sum(count * times[1] for count, times in parts),
    )


class HostTimes:
    """Collects host times; ranks 0 and 1 measure, each joining process groups of its own.

    The process group of the other measurements must have been destroyed.
    """

    def __init__(self, folder: Path, rank: int, clock: Clock) -> None:
        self.folder, self.rank = folder, rank
        self.operators = OperatorTimes(Buffers(torch.device("cpu"), torch.float32), clock)
        self.block_s = self.operators.block()
        self.found: dict[str, float] = {}

    def single_process(self) -> None:
        """Glue per layer, recomputed block, micro-batch and step, of one process alone."""
        self._join(f"alone{self.rank}", 0, 1)
        plans = {
            "few": tiny_plan(FEW),
            "many": tiny_plan(MANY),
            "three": tiny_plan(FEW, num_microbatches=3),
            "full": tiny_plan(MANY, recompute="full"),
            "experts.few": tiny_plan(FEW, experts=steps.EXPERTS),
            "experts.many": tiny_plan(MANY, experts=steps.EXPERTS),
            "documents.few": tiny_plan(FEW, documents=True),
            "documents.many": tiny_plan(MANY, documents=True),
        }
        times = steps.run_interleaved(plans)
        few, many = times["few"], times["many"]
        self.few_s, self.many_s = few.typical("total"), many.typical("total")
        self.forward_s = per_layer_s(few, many, "forward")
        self.backward_s = per_layer_s(few, many, "backward")
        self.micro_s = (times["three"].typical("total") - self.few_s) / 2
        twice = times["full"].typical("total") - self.many_s
        accumulate = self.operators.of("accumulate", _num_params(few))[0]
        adamw = self.operators.of("adamw", _num_params(few), _num_tensors(few))[0]
        layers_s = FEW * (self.forward_s + self.backward_s)
        self._keep("layer_forward", self.forward_s - self.block_s[0])
        self._keep("layer_backward", self.backward_s - self.block_s[1])
        for name, whole in (("forward", self.forward_s), ("backward", self.backward_s)):
            packed = per_layer_s(times["documents.few"], times["documents.many"], name)
            self._keep(f"document_{name}", (packed - whole) / SEQ)
        few, many = times["experts.few"], times["experts.many"]
        self.expert_forward_s = per_layer_s(few, many, "forward")
        self.expert_backward_s = per_layer_s(few, many, "backward")
        expert_block_s = self.operators.expert_block()
        self._keep("expert_layer_forward", self.expert_forward_s - expert_block_s[0])
        self._keep("expert_layer_backward", self.expert_backward_s - expert_block_s[1])
        self._keep("checkpoint", twice / MANY - self.forward_s)
        self._keep("micro_batch", self.micro_s - accumulate - layers_s - self.operators.ends_s())
        self._keep("step", self.few_s - self.micro_s + accumulate - adamw)
        dist.destroy_process_group()

    def two_processes(self) -> None:
        """What DDP, FSDP2, tensor and pipeline parallelism add, in a group of two."""
        self._join("pair", self.rank, 2)
        plans = {}
        for layers, label in ((FEW, "few"), (MANY, "many")):
            plans[f"ddp.{label}"] = tiny_plan(layers, mesh=Mesh(dp_replicate=2))
            plans[f"fsdp.{label}"] = tiny_plan(layers, mesh=Mesh(dp_shard=2), zero=1)
            plans[f"tp.{label}"] = tiny_plan(layers, mesh=Mesh(tp=2))
            plans[f"tp_sp.{label}"] = tiny_plan(layers, mesh=Mesh(tp=2), sequence_parallel=True)
            apart = Mesh(dp_replicate=2, ep=2)
            plans[f"ep.{label}"] = tiny_plan(layers, mesh=apart, experts=steps.EXPERTS)
            plans[f"ring.{label}"] = tiny_plan(layers, mesh=Mesh(cp=2))
            plans[f"ulysses.{label}"] = tiny_plan(layers, mesh=Mesh(cp=2, ulysses=2))
        times = steps.run_interleaved(plans)
        kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
        calls = {kind: _call_s(kind, self.rank) for kind in kinds}
        self._keep(
            "ddp_step", times["ddp.many"].typical("total") - self.many_s - calls["all_reduce"]
        )
        self._extra("fsdp_unit", times, "fsdp", calls["all_gather"], calls["reduce_scatter"])
        self._extra("tp_layer", times, "tp", 2 * calls["all_reduce"], 2 * calls["all_reduce"])
        both = 2 * (calls["all_gather"] + calls["reduce_scatter"])
        self._extra("tp_sp_layer", times, "tp_sp", both, both)
        self._extra("ulysses_layer", times, "ulysses", *[4 * calls["all_to_all"]] * 2)
        block = self.operators.of("attention_full", HEADS, SEQ // 2, HEAD_DIM, SEQ // 4)
        add = self.operators.of("add", SEQ * HIDDEN)[0]
        # a round is priced as an all-gather's, and there are two of them in backward
        self._extra("ring_block", times, "ring", calls["all_gather"] + block[0] + add,
                    2 * calls["all_gather"] + block[1] + 2 * add)  # fmt: skip
        few, many = times["ep.few"], times["ep.many"]
        for name, alone_s, num_calls in (
            ("forward", self.expert_forward_s, 3),
            ("backward", self.expert_backward_s, 2),
        ):
            beyond_s = per_layer_s(few, many, name) - alone_s - num_calls * calls["all_to_all"]
            self._keep(f"ep_layer_{name}", beyond_s)
        self._pipeline(calls["p2p"])
        dist.destroy_process_group()

    def _extra(
        self,
        name: str,
        times: dict[str, TimedTrainer],
        family: str,
        forward_calls_s: float,
        backward_calls_s: float,
    ) -> None:
        """Time per layer beyond that of one process and beyond what is priced: calls of
        collectives, further operators."""
        few, many = times[f"{family}.few"], times[f"{family}.many"]
        forward, backward = per_layer_s(few, many, "forward"), per_layer_s(few, many, "backward")
        self._keep(f"{name}_forward", forward - self.forward_s - forward_calls_s)
        self._keep(f"{name}_backward", backward - self.backward_s - backward_calls_s)

    def _pipeline(self, call_s: float) -> None:
        """Per action: a micro-batch is a forward and a backward, one message sent, one received.

        A rank has half of the layers and, on average, half of embedding and head.
        """
        plans = {str(num): tiny_plan(FEW, mesh=Mesh(pp=2), num_microbatches=num) for num in (2, 6)}
        times = steps.run_interleaved(plans)
        micro_s = (times["6"].typical("total") - times["2"].typical("total")) / 4
        self._keep("pp_action", (micro_s - self.micro_s / 2) / 2 - call_s)

    def _keep(self, name: str, seconds: float) -> None:
        self.found[name] = max(0.0, seconds)

    def _join(self, name: str, rank: int, world: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{self.folder / name}", rank=rank, world_size=world
        )


def _num_params(timed: TimedTrainer) -> int:
    return sum(p.numel() for piece in timed.trainer.pieces for p in piece.parameters())


def _num_tensors(timed: TimedTrainer) -> int:
    return sum(1 for piece in timed.trainer.pieces for _ in piece.parameters())


def _call_s(kind: str, rank: int) -> float:
    """This thread's processor time of one small collective, which its measured curve includes."""
    whole, shard, other = torch.ones(1024), torch.ones(512), torch.ones(1024)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, shard),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "p2p": lambda: _exchange(whole, rank),
    }
    samples = []
    for _ in range(20):
        whole.zero_()
        start = time.thread_time()
        calls[kind]()
        samples.append(time.thread_time() - start)
    return median(samples)


def _exchange(tensor: Tensor, rank: int) -> None:
    call = dist.isend if rank == 0 else dist.irecv
    for work in dist.batch_isend_irecv([dist.P2POp(call, tensor, 1 - rank)]):
        work.wait()


def measure(folder: Path, rank: int, world: int, clock: Clock) -> dict[str, float]:
    """Host seconds by name on a CPU, as this rank sees them; ranks from 2 on take no part."""
    if rank > 1:
        return {}
    times = HostTimes(folder, rank, clock)
    times.single_process()
    if world > 1:
        times.two_processes()
    return times.found
