"""What layers keep, make again or move off the device: predicted against measured, and budgets.

Runs one decoder on one CPU process under several policies and writes the table into
docs/memory.md: the peak of live tensors, bytes moved off the device, step time beside the plain run
that was taken in turns with it. A run whose activations exceed the budget given by --budget (a
part of the plain peak) must complete under it where its prediction says so. Then the tensors of a
step in one arena: its size against max-live and against a caching allocator's, and what running out
of it costs.

    python benchmarks/bench_memory.py [--layers 8] [--hidden 256] [--seq-len 512] [--rounds 3]
    python benchmarks/bench_memory.py --short       some policies, one round: a few minutes
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from pathlib import Path
from typing import Any

import msgspec

from forerun import Layer, Measurement, Mesh, Model, Plan, PlanFile, RunFailed, Workload
from forerun.catalogs import load_cluster
from forerun.costmodel import estimate
from forerun.executors import run
from forerun.plan import Phase, Setting, even_stages, techniques
from forerun.units import format_bytes

BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
KEEP = ["x1", "o", "lse"]
POLICIES: dict[str, tuple[dict[str, dict[str, Any]], int]] = {
    "plain": ({}, 0),
    "recompute elementwise": ({"recompute": {"mode": "elementwise"}}, 0),
    "recompute tensors, keep x1,o,lse": ({"recompute": {"mode": "tensors", "keep": KEEP}}, 0),
    "recompute full": ({"recompute": {"mode": "full"}}, 0),
    "offload half": ({"offload": {"activations": 0.5}}, 2),
    "offload all": ({"offload": {"activations": 1.0}}, 2),
    "offload all to disk": ({"offload": {"activations": 1.0, "tier": "disk"}}, 2),
    "offload half of the tokens": ({"offload": {"activations": 0.5, "rest": "recompute"}}, 2),
    "offload all and the optimiser": (
        {"offload": {"activations": 1.0, "states": "optimizer"}}, 2,
    ),
}  # fmt: skip
"""Techniques, and the last layers that keep their activations."""
SHORT = (
    "plain", "recompute tensors, keep x1,o,lse", "recompute full", "offload all",
    "offload half of the tokens",
)  # fmt: skip


def make_file(options: argparse.Namespace, policy: str, budget: int | None = None) -> PlanFile:
    """The plan of a policy, predicted with this machine's profile."""
    more, spared = POLICIES[policy]
    layer = Layer(
        repeat=options.layers, heads=options.hidden // 32, kv_heads=options.hidden // 32,
        head_dim=32, ffn_hidden=options.hidden * 11 // 4 // 32 * 32,
    )  # fmt: skip
    model = Model(name="bench", hidden=options.hidden, vocab=512, layers=(layer,))
    cluster = load_cluster("1xcpu")
    if budget is not None:
        pool = cluster.pools[0]
        device = msgspec.structs.replace(pool.device, memory_bytes=budget, tensors_only=True)
        pool = msgspec.structs.replace(pool, device=device)
        cluster = msgspec.structs.replace(cluster, pools=(pool,))
    last = options.layers - 1
    plain = techniques("fp32", "none")
    settings = [Setting(layers=(0, last - spared), techniques=plain | more)]
    if spared:
        rest = {name: {"states": "optimizer"} for name in more if "states" in more[name]}
        settings.append(Setting(layers=(last - spared + 1, last), techniques=plain | rest))
    phase = Phase(
        steps=options.steps, seq_tokens=options.seq_len, micro_batch_seqs=options.micro_batch,
        num_microbatches=1, mesh=Mesh(), stages=even_stages(options.layers, 1, "cpu"),
        settings=tuple(settings),
    )  # fmt: skip
    workload = Workload(
        seq_tokens=options.seq_len, global_batch_seqs=options.micro_batch, steps=options.steps
    )
    plan = Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))
    return PlanFile(label=policy, plan=plan, estimate=estimate(plan))


def live_bytes(plan_file: PlanFile) -> float:
    """Predicted live tensors at the peak."""
    terms = plan_file.estimate.memory_terms_bytes.items()
    return sum(n for term, n in terms if term not in ("fragmentation", "context"))


def table(options: argparse.Namespace) -> list[str]:
    """A row per policy, runs taken in turns."""
    files = {policy: make_file(options, policy) for policy in options.policies}
    runs: dict[str, list[Measurement]] = {policy: [] for policy in options.policies}
    for turn in range(options.rounds):
        for policy, plan_file in files.items():
            runs[policy].append(run(plan_file, steps=options.steps, warmup_steps=1))
            print(f"round {turn + 1} {policy}", flush=True)
    lines = [
        "| policy | predicted MiB | measured MiB | error | off the device MiB | moved per step MiB "
        "| as predicted | step / plain | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain_s = files["plain"].estimate.step_s.median
    for policy, plan_file in files.items():
        first, predicted = runs[policy][0], plan_file.estimate
        ratios = [
            one.step_s.median / plain.step_s.median
            for one, plain in zip(runs[policy], runs["plain"], strict=True)
        ]
        expected, measured = live_bytes(plan_file), first.peak_memory_bytes
        same = "equal" if first.bytes_copied == predicted.bytes_copied else "DIFFERENT"
        lines.append(
            f"| {policy} | {expected / 2**20:.1f} | {measured / 2**20:.1f} "
            f"| {expected / measured - 1:+.1%} "
            f"| {sum(first.bytes_off_device.values()) / 2**20:.1f} "
            f"| {sum(first.bytes_copied.values()) / 2**20:.1f} | {same} "
            f"| {statistics.median(ratios):.2f} | {predicted.step_s.median / plain_s:.2f} |"
        )
    return lines


def budgets(options: argparse.Namespace) -> list[str]:
    """What a device with a part of the plain peak can run."""
    plain = live_bytes(make_file(options, "plain"))
    budget = int(options.budget * plain)
    lines = [
        f"Budget on live tensors: {format_bytes(budget)}, {options.budget:.0%} of the plain peak.",
        "",
    ]
    for policy in options.policies:
        plan_file = make_file(options, policy, budget)
        fits = live_bytes(plan_file) <= budget
        if not fits and policy != "plain":
            continue
        try:
            measured = run(plan_file, steps=2, warmup_steps=1)
            peak = measured.peak_memory_bytes
            verdict = (
                f"completes, peak {format_bytes(peak)}, predicted "
                f"{live_bytes(plan_file) / peak - 1:+.1%}"
            )
        except RunFailed as error:
            verdict = f"is refused: {error}"
        lines.append(f"- {policy} {verdict}")
    return lines


def arenas(options: argparse.Namespace) -> list[str]:
    """Static plans of measured traces, and the cost of running out of an arena."""
    lines = [
        "| policy | tensors | max-live MiB | solved offsets / max-live | caching / max-live "
        "| in the arena | step / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = ("plain", "recompute full", "offload half of the tokens")
    for policy in chosen[:1] if options.short else chosen:
        plan_file = make_file(options, policy)
        ratios: list[float] = []
        found: dict[str, float] = {}
        for _ in range(options.rounds):
            plain = run(plan_file, steps=options.steps, warmup_steps=1)
            ours = run(plan_file, steps=options.steps, warmup_steps=3, static_memory="run")
            ratios.append(ours.step_s.median / plain.step_s.median)
            found = ours.allocator
        live = found["max_live_bytes"]
        whole = found["placed_bytes"] + found["not_placed_bytes"]
        lines.append(
            f"| {policy} | {found['tensors']:.0f} | {live / 2**20:.1f} "
            f"| {found['static_plan_bytes'] / live:.4f} | {found['caching_bytes'] / live:.3f} "
            f"| {found['placed_bytes'] / whole:.1%} | {statistics.median(ratios):.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--report", type=Path, default=Path("docs/memory.md"))
    options = parser.parse_args()
    options.policies = SHORT if options.short else tuple(POLICIES)
    if options.short:
        options.rounds, options.steps = 1, 3
    lines = [
        BEGIN,
        f"{options.layers} layers of hidden size {options.hidden}, {options.micro_batch} sequences "
        f"of {options.seq_len} tokens, fp32, one process, {datetime.date.today()}; "
        f"{options.rounds} rounds in turns.",
        "",
        *table(options),
        "",
        *budgets(options),
        "",
        *arenas(options),
        END,
    ]
    print("\n".join(lines))
    text = options.report.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    options.report.write_text(before + "\n".join(lines) + after)


if __name__ == "__main__":
    main()
