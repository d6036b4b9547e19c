"""How near the simulator paced runs come, for every schedule: step times on an emulated device.

python benchmarks/bench_paced.py [RANKS ...]      (default: 4 8)
"""

from __future__ import annotations

import statistics
import sys

from forerun.catalogs import load_cluster
from forerun.cli.layout import fixed_plan
from forerun.costmodel import estimate
from forerun.executors import run
from forerun.model import Layer, Model
from forerun.plan import PlanFile
from forerun.planner import Pins
from forerun.schedules import LOOPED_SCHEDULES, SCHEDULES, V_SCHEDULES
from forerun.workload import Workload

STEPS = 3
COMPOSED = {
    "zb-h1 x ddp": {"schedule": "zb-h1", "dp": 2},
    "zb-v x zero3": {"schedule": "zb-v", "vpp": 2, "dp": 2, "zero": 3},
    "zb-v x tp-sp": {"schedule": "zb-v", "vpp": 2, "tp": 2, "sp": True},
    "1f1b full": {"schedule": "1f1b", "recompute": "full"},
    "zb-h1 full": {"schedule": "zb-h1", "recompute": "full"},
}


def families(ranks: int) -> dict[str, Pins]:
    """The pins of each family."""
    found: dict[str, Pins] = {}
    for schedule in SCHEDULES:
        chunks = 2 if schedule in (*V_SCHEDULES, *LOOPED_SCHEDULES) else 1
        found[schedule] = Pins(pp=ranks, vpp=chunks, schedule=schedule)
    for name, axes in COMPOSED.items():
        others = axes.get("dp", 1) * axes.get("tp", 1)
        found[name] = Pins(pp=ranks // others, **axes)  # pyright: ignore[reportArgumentType]
    return found


def main() -> None:
    """Print predicted and measured step, their error and what was late, family by family."""
    errors: list[float] = []
    for ranks in [int(word) for word in sys.argv[1:]] or [4, 8]:
        layer = Layer(repeat=2 * ranks, heads=2, kv_heads=2, head_dim=16, ffn_hidden=64)
        model = Model(name="small", hidden=32, vocab=256, layers=(layer,))
        workload = Workload(seq_tokens=64, global_batch_seqs=4 * ranks, steps=STEPS)
        cluster = load_cluster(f"{ranks}xH100")
        for name, pins in families(ranks).items():
            plan = fixed_plan(model, cluster, workload, pins)
            plan_file = PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))
            measured = run(plan_file, pace="plan", warmup_steps=2)
            predicted_s = float(measured.environment["simulated_step_s"])
            error = predicted_s / measured.step_s.median - 1
            errors.append(error)
            print(f"{ranks} {name:16s} predicted {1e3 * predicted_s:8.2f} ms  measured "
                  f"{1e3 * measured.step_s.median:8.2f} ms  error {100 * error:+5.1f} %  late "
                  f"{measured.environment['pace_late']}  scale "
                  f"{measured.environment['pace_scale']}", flush=True)  # fmt: skip
    sizes = [abs(error) for error in errors]
    print(f"{len(errors)} families: median {100 * statistics.median(sizes):.1f} %, worst "
          f"{100 * max(sizes):.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
