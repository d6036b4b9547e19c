"""Predicted against measured on one GPU: step time and peak memory, from constants and a profile.

    python benchmarks/bench_gpu.py --gpus 1xH200 [--profile]

Every plan is predicted twice: from the catalog's constants alone, and from the machine's profile
(`--profile` measures it first, in under three minutes). The host times of the PyTorch stacks were
set on the three short cases, nothing else was fitted to these runs. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import msgspec

from forerun import Mesh, Plan, PlanFile, Workload
from forerun.catalogs import load_cluster, load_model
from forerun.costmodel import diff, estimate
from forerun.errors import ForerunError
from forerun.executors import run
from forerun.plan import Phase, Setting, even_stages, techniques


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and how it is run."""

    model: str
    seq_tokens: int
    micro_batch_seqs: int
    recompute: str = "none"
    compute: str = "bf16"


CASES = (
    Case(model="qwen2.5-0.5b", seq_tokens=256, micro_batch_seqs=1),
    Case(model="llama-3.2-1b", seq_tokens=256, micro_batch_seqs=1),
    Case(model="llama-3.2-3b", seq_tokens=256, micro_batch_seqs=1),
    Case(model="qwen2.5-0.5b", seq_tokens=2048, micro_batch_seqs=1),
    Case(model="qwen2.5-0.5b", seq_tokens=2048, micro_batch_seqs=8),
    Case(model="llama-3.2-1b", seq_tokens=4096, micro_batch_seqs=4),
    Case(model="llama-3.2-1b", seq_tokens=4096, micro_batch_seqs=4, recompute="full"),
    Case(model="llama-3.2-1b", seq_tokens=16384, micro_batch_seqs=1),
    Case(model="llama-3.2-3b", seq_tokens=4096, micro_batch_seqs=4, recompute="full"),
)


def make_plan(case: Case, gpus: str, profiled: bool) -> PlanFile:
    """The plan of a case, priced with the machine's profile or without any."""
    model, cluster = load_model(case.model), load_cluster(gpus)
    if not profiled:
        cluster = msgspec.structs.replace(cluster, profile=None)
    workload = Workload(
        seq_tokens=case.seq_tokens, global_batch_seqs=2 * case.micro_batch_seqs, steps=8
    )
    phase = Phase(
        steps=8,
        seq_tokens=case.seq_tokens,
        micro_batch_seqs=case.micro_batch_seqs,
        num_microbatches=2,
        mesh=Mesh(),
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(
            Setting(
                layers=(0, model.num_layers - 1),
                techniques=techniques(case.compute, case.recompute),
            ),
        ),
    )
    plan = Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))
    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", default="1xH200")
    parser.add_argument("--profile", action="store_true", help="measure the GPU first")
    options = parser.parse_args()
    if options.profile:
        from forerun.catalogs import save_user_profile
        from forerun.executors.profiling import profile_machine

        save_user_profile(profile_machine(device="cuda"))
    print("| plan | measured ms | constants | profile | measured GiB | predicted | error |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        plain, profiled = (make_plan(case, options.gpus, there) for there in (False, True))
        try:
            measured = run(profiled, steps=8, warmup_steps=3)
        except ForerunError as error:
            print(f"{case.model}: {error}", file=sys.stderr)
            continue
        step_s = measured.step_s.median
        memory = diff(profiled, measured)["memory"]
        errors = [file.estimate.step_s.median / step_s - 1 for file in (plain, profiled)]
        print(
            f"| {case.model} {case.seq_tokens} `{profiled.label}` | {step_s * 1e3:.1f} "
            f"| {errors[0]:+.1%} | {errors[1]:+.1%} | {memory['measured_bytes'] / 2**30:.1f} "
            f"| {memory['predicted_bytes'] / 2**30:.1f} | {memory['error']:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
