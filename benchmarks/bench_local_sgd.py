"""Replicas that train apart on a slow link: step time, bytes and loss beside synchronous training.

    python benchmarks/bench_local_sgd.py [--rate 100Mbit/s] [--steps 200] [--model tiny-6m]

Two processes are two nodes, what they send one another is held to the rate (`run --emulate-links`,
Linux). A table in Markdown: step time predicted and measured (means over whole rounds), bytes per
step predicted and counted, the gain over synchronous data parallelism on the same link, and the
loss after the steps beside that of synchronous training, which does not depend on the link.

The prediction is that of this machine's profile (`forerun profile` first), its compute corrected by
replicas apart without a slow link, minutes before: a shared machine is not as fast at noon as it
was when it was profiled. Nothing of the slow link is fitted. The second error is that of meetings
alone: predicted on top of the median of those steps of the run after which nothing happens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import msgspec

from forerun import PlanFile
from forerun.catalogs import load_model, resolve_gpus
from forerun.cli.layout import fixed_plan
from forerun.cli.outer import parse_outer
from forerun.cluster import Cluster, Profile
from forerun.costmodel import estimate
from forerun.costmodel.calibrate import calibrate
from forerun.costmodel.simulate import Simulation
from forerun.executors import launch
from forerun.measurement import Measurement
from forerun.planner import Pins
from forerun.units import format_seconds, parse_rate
from forerun.workload import Workload

SEQ_TOKENS, BATCH_SEQS = 64, 4
COMPUTE = ("forward", "backward", "optimizer", "host")
"""Terms that the run without a slow link corrects."""
WAYS: tuple[tuple[int, str], ...] = (
    (10, "average"),
    (20, "diloco,fragments=2,delay=9"),
    (20, "diloco,fragments=2,delay=4,bits=4"),
    (8, "co2"),
)
"""--local-sgd and --outer."""
LAST = 10
"""Steps over which losses are averaged."""


def replace_rate(cluster: Cluster, rate: float) -> Cluster:
    """The cluster with that rate between its nodes."""
    pools = tuple(
        msgspec.structs.replace(
            pool, inter_node=msgspec.structs.replace(pool.intra_node, bytes_per_s=rate)
        )
        for pool in cluster.pools
    )
    return msgspec.structs.replace(cluster, pools=pools)


class Bench:
    """Plans of one model on one cluster, predicted and run."""

    def __init__(self, model: str, steps: int, rate: str) -> None:
        self.model, self.steps = load_model(model), steps
        self.near = resolve_gpus("2xcpu").cluster
        self.far = replace_rate(resolve_gpus("2x1xcpu").cluster, parse_rate("rate", rate))
        self.profile: Profile | None = self.near.profile

    def plan(self, cluster: Cluster, period: int | None = None, how: str | None = None) -> PlanFile:
        """A plan of two replicas, synchronous or apart."""
        workload = Workload(seq_tokens=SEQ_TOKENS, global_batch_seqs=BATCH_SEQS,
                            steps=self.steps, learning_rate=1e-3)  # fmt: skip
        cluster = msgspec.structs.replace(cluster, profile=self.profile)
        pins = Pins(dp=2, micro_batch=BATCH_SEQS // 2, local_sgd=parse_outer(period, how))
        plan = fixed_plan(self.model, cluster, workload, pins)
        return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))

    def correct(self, plan_file: PlanFile, measured: Measurement) -> None:
        """Compute as fast as it was in a run."""
        if self.profile is None:
            sys.exit("no profile of this machine: run forerun profile first")
        found = calibrate(self.profile, [(plan_file, measured)])
        scale = {name: found.scale[name] for name in COMPUTE if name in found.scale}
        self.profile = msgspec.structs.replace(found, scale=self.profile.scale | scale)

    def apart(self, period: int, how: str) -> tuple[PlanFile, Measurement]:
        """A plan of replicas apart on the slow link, for all steps."""
        plan_file = self.plan(self.far, period, how)
        local = plan_file.plan.phase.local_sgd
        assert local is not None
        _, before = launch.whole_rounds(plan_file.plan, 1, 0)
        steps = max(period, self.steps - before)
        return plan_file, launch.run(
            plan_file, steps=steps, warmup_steps=before, emulate_links=True
        )


def last_loss(measured: Measurement, steps: int) -> float:
    """Mean loss of the last steps up to a step."""
    return statistics.fmean(measured.loss[:steps][-LAST:])


def row(
    plan_file: PlanFile, measured: Measurement, sync_s: float, loss: float, sync_loss: float
) -> str:
    """One line of the table."""
    predicted, found = plan_file.estimate.step_s.median, measured.step_s.median
    told = sum(plan_file.estimate.bytes_on_wire.values()) / 1e6
    counted = sum(measured.bytes_on_wire.values()) / 1e6
    gap = 100 * (loss / sync_loss - 1)
    return (
        f"| `{plan_file.label}` | {format_seconds(predicted)} | {format_seconds(found)} | "
        f"{100 * (predicted / found - 1):+.1f} % | {beside(plan_file, measured)} | {told:.3f} | "
        f"{counted:.3f} | {sync_s / found:.1f} x | {loss:.4f} | {gap:+.2f} % |"
    )


def beside(plan_file: PlanFile, measured: Measurement) -> str:
    """How far the prediction is off with inner steps as long as they were in the run."""
    plan = plan_file.plan
    meetings, local = Simulation(plan, plan.phase).meetings, plan.phase.local_sgd
    if meetings is None or local is None:
        return ""
    busy = {
        (local.starts(which) + steps - 1) % local.period
        for which in range(local.fragments)
        for steps in (0, local.half_way, local.steps_late)
    }
    inner_s = statistics.median(
        s for index, s in enumerate(measured.steps) if index % local.period not in busy
    )
    told_s = inner_s + meetings.exposed_s(inner_s) + meetings.work_s
    return f"{100 * (told_s / measured.step_s.median - 1):+.1f} %"


HEAD = (
    "| plan | predicted | measured | error | of meetings | MB per step, predicted | counted | "
    "gain | loss | against synchronous |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="100Mbit/s")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default="tiny-6m")
    parser.add_argument("--slow-steps", type=int, default=8, help="synchronous steps on the link")
    given = parser.parse_args(arguments)
    bench = Bench(given.model, given.steps, given.rate)
    near = bench.plan(bench.near)
    fast = launch.run(near, steps=given.steps - 3, warmup_steps=3)
    sync_loss = last_loss(fast, given.steps)
    alone = bench.plan(bench.near, 20, "average")
    bench.correct(alone, launch.run(alone, steps=20))
    print(
        f"without a slow link: {format_seconds(fast.step_s.median)} per step\n\n{HEAD}", flush=True
    )
    slow = bench.plan(bench.far)
    measured = launch.run(slow, steps=given.slow_steps, warmup_steps=2, emulate_links=True)
    sync_s = measured.step_s.median
    print(row(slow, measured, sync_s, sync_loss, sync_loss), flush=True)
    for period, how in WAYS:
        plan_file, measured = bench.apart(period, how)
        loss = last_loss(measured, given.steps)
        print(row(plan_file, measured, sync_s, loss, sync_loss), flush=True)


if __name__ == "__main__":
    main()
