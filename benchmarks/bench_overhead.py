"""What the executor costs beyond a plain PyTorch loop of the same model: one process, and DDP.

    python benchmarks/bench_overhead.py --model tiny-3m --pairs 40

Both sides train in the same processes, a step of one after a step of the other, so that a machine
that slows down hurts both; each step is timed between barriers. The plain loop is written out here:
the module, `DistributedDataParallel` with its defaults, fused AdamW, cross-entropy, data from the
same corpus. The executor's side is a training run's step as `worker.Run` takes it: batch, forward
and backward, optimiser, the loss agreed on by all ranks and its report. The ratio of a pair is
executor over plain; the median over all pairs is what counts, its quartiles stand beside it. On a
machine that others use, too, the ratio of the processes' own CPU time is steadier than that of
wall-clock time; both are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from forerun import Mesh, Plan, Workload
from forerun.catalogs import load_cluster, load_model
from forerun.executors import corpus, data, init, job
from forerun.executors.decoder import Decoder
from forerun.executors.worker import Run
from forerun.plan import Phase, Setting, even_stages, techniques

BAR = 0.02


def make_plan(model_name: str, processes: int, seq_tokens: int, batch_seqs: int) -> Plan:
    """DDP over the processes, a micro-batch per replica."""
    model, cluster = load_model(model_name), load_cluster(f"{processes}xcpu")
    last = model.num_layers - 1
    phase = Phase(
        steps=1,
        seq_tokens=seq_tokens,
        micro_batch_seqs=batch_seqs // processes,
        num_microbatches=1,
        mesh=Mesh(dp_replicate=processes),
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(Setting(layers=(0, last), techniques=techniques("fp32", "none")),),
    )
    workload = Workload(seq_tokens=seq_tokens, global_batch_seqs=batch_seqs)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def plain_loop(plan: Plan, text: Any, rank: int) -> Callable[[int], float]:
    """A step of the hand-written loop; its loss is read, as any loop that logs does."""
    model, phase = plan.model, plan.phase
    module = Decoder(model, 0, model.num_layers - 1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(init.full_parameter(name, tuple(p.shape), model, 0, torch.device("cpu")))
    called: Any = DistributedDataParallel(module) if phase.mesh.dp > 1 else module
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(index: int) -> float:
        tokens: Tensor = data.batch(text, 0, index, phase, rank)
        logits = called(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if phase.mesh.dp > 1:
            dist.all_reduce(mean)
        return float(mean) / phase.mesh.dp

    return step


def rank_main(rank: int, processes: int, options: argparse.Namespace, folder: Path) -> None:
    """One rank: pairs of steps, both sides warmed up; rank 0 writes the seconds."""
    plan = make_plan(options.model, processes, options.seq_len, options.global_batch)
    ask = job.Training(metrics=None)
    work = job.Job(plan=plan, device="cpu", warmup_steps=0, steps=None, training=ask,
                   started_s=time.time(), ranks_per_node=(processes,))  # fmt: skip
    text = data.open_corpus(folder / job.CORPUS)
    run = Run(work, text, job.Progress(folder, rank), folder)
    assert run.keeper is not None
    run.keeper.resume(lambda: None)
    plain = plain_loop(plan, text, rank)
    seconds: list[list[float]] = []
    for index in range(options.warmup + options.pairs):
        pair: dict[str, tuple[float, float]] = {}
        sides = ("executor", "plain") if index % 2 else ("plain", "executor")
        for side in sides:
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            if side == "plain":
                theirs = plain(index)
            else:
                _, ours, wishes = run.train_step()
                run.keeper.after_step(run.next_step, ours, 0.0, wishes)
            own = time.process_time() - used
            dist.barrier()
            pair[side] = (time.perf_counter() - start, own)
        assert abs(ours - theirs) <= 1e-5 * theirs, (ours, theirs)
        if index >= options.warmup:
            seconds.append([*pair["executor"], *pair["plain"]])
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure(processes: int, options: argparse.Namespace) -> list[list[float]]:
    """Of every pair: wall and CPU seconds of the executor, wall and CPU seconds of the loop."""
    with tempfile.TemporaryDirectory(prefix="forerun-overhead-") as name:
        folder = Path(name)
        (folder / job.CORPUS).write_bytes(corpus.load(None))
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        arguments = [sys.executable, __file__, *sys.argv[1:], "--rank-folder", name]
        ranks = [
            subprocess.Popen(
                arguments,
                env=os.environ
                | {
                    job.NODE: "0",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "MALLOC_MMAP_THRESHOLD_": "4294967296",
                    "MALLOC_TRIM_THRESHOLD_": "17179869184",
                },
            )
            for rank in range(processes)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        return json.loads((folder / "seconds.json").read_text())


def report(name: str, seconds: list[list[float]]) -> float:
    """Print one side against the other; returns the median ratio of wall-clock times."""
    found: list[float] = []
    for what, (mine, other) in (("wall", (0, 2)), ("CPU", (1, 3))):
        ratios = sorted(pair[mine] / pair[other] for pair in seconds)
        quarter = len(ratios) // 4
        ours, theirs = (1e3 * statistics.median(p[k] for p in seconds) for k in (mine, other))
        found.append(statistics.median(ratios))
        print(
            f"{name}, {what} time: executor {ours:.1f} ms, plain loop {theirs:.1f} ms, "
            f"paired ratio {found[-1]:.4f} (quartiles {ratios[quarter]:.4f} to "
            f"{ratios[-quarter - 1]:.4f}, {len(ratios)} pairs)",
            flush=True,
        )
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-3m")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_folder is not None:
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        rank_main(rank, processes, options, options.rank_folder)
        return 0
    ratios = [report("1 process", measure(1, options)), report("DDP, 2 processes",
                                                               measure(2, options))]  # fmt: skip
    worst = max(ratios) - 1
    print(f"worst median overhead {worst:+.2%}, bar {BAR:.0%}")
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
