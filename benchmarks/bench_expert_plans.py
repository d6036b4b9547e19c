"""The planner against the experts: for every published run, is our plan predicted at least as fast?

    python benchmarks/bench_expert_plans.py tests/validation/published_dev.csv [--every N]

Of each distinct (model, devices, batch, techniques) the published plan and the best of a search
with the same model, devices, batch, precision, optimiser, kernels and software stack are priced by
the same cost model. The search may choose degrees, micro-batch, schedule, ZeRO stage and what
layers keep. A published plan whose predicted median peak is beyond the memory breaks a rule that
the search obeys and is counted apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from forerun.costmodel.options import Options
from forerun.costmodel.validate import build_cases, outcomes, read_table
from forerun.costmodel.validate.predict import Outcome
from forerun.document import to_json
from forerun.errors import ForerunError
from forerun.planner import Pins, search

SLACK = 1e-6


def main() -> None:
    """Print every published plan that is predicted faster than ours, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--every", type=int, default=1, help="Take every N-th group.")
    arguments = parser.parse_args()
    found = [
        x for x in outcomes(build_cases(read_table(arguments.table))) if isinstance(x, Outcome)
    ]
    groups: dict[object, Outcome] = {}
    for outcome in found:
        plan = outcome.prediction.candidate.plan
        key = (to_json(plan.model), to_json(plan.cluster), to_json(plan.workload),
               _techniques(outcome))  # fmt: skip
        best = groups.get(key)
        if best is None or outcome.prediction.step_s.median < best.prediction.step_s.median:
            groups[key] = outcome
    ratios: list[float] = []
    beyond = slower = failed = 0
    began = time.process_time()
    for outcome in list(groups.values())[:: arguments.every]:
        plan = outcome.prediction.candidate.plan
        pins = Pins(offload=None if plan.cluster.pools[0].host else 0.0)
        try:
            result = search(
                plan.model, plan.cluster, plan.workload, pins, keep=1, fit="marginal",
                fixed=_techniques(outcome),
            )  # fmt: skip
        except ForerunError as error:
            failed += 1
            print(f"{outcome.case.row.id}: {error}")
            continue
        theirs = outcome.prediction.step_s.median
        if not result.plans:
            beyond += outcome.prediction.fit_probability < 0.5
            failed += outcome.prediction.fit_probability >= 0.5
            print(f"{outcome.case.row.id}: ours finds nothing that fits")
            continue
        ours = result.plans[0].estimate.step_s.median
        ratios.append(theirs / ours)
        if ours > theirs * (1 + SLACK):
            if outcome.prediction.fit_probability < 0.5:
                beyond += 1
                continue
            slower += 1
            print(
                f"{outcome.case.row.id}: theirs {theirs:.4g} s ({plan.label}), "
                f"ours {ours:.4g} s ({result.plans[0].label})"
            )
    ratios.sort()
    took_s = time.process_time() - began
    print(
        f"{len(ratios)} groups, {took_s:.0f} CPU s: theirs faster in {slower}, "
        f"beyond the memory {beyond}, not planned {failed}; median speed-up "
        f"{ratios[len(ratios) // 2]:.3f}, largest {ratios[-1]:.2f}"
    )
    sys.stdout.flush()


def _techniques(outcome: Outcome) -> Options:
    """What the published plan does besides what its layers keep."""
    plan = outcome.prediction.candidate.plan
    return replace(Options.of(plan.phase, plan.workload), recompute="none", offload=0.0)


if __name__ == "__main__":
    main()
