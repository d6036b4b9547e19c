"""Predicted against measured on one GPU: step time, peak memory and the order of plans.

    forerun profile --device cuda
    python benchmarks/bench_gpu.py [--gpus 1xH200] [--groups 0.4b-2k,1b-8k,...] [--json FILE]

Plans of a group share model, length and batch, so that the one predicted to be the fastest can be
held against the one that is. Every plan is predicted twice: from the catalog's constants alone and
from the machine's profile. Nothing was fitted to these runs. Prints a Markdown table and a summary.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from forerun import PlanFile, Workload
from forerun.catalogs import load_cluster, load_model
from forerun.cli.layout import fixed_plan
from forerun.costmodel import diff, estimate
from forerun.costmodel.diff import NOT_LIVE
from forerun.errors import ForerunError
from forerun.executors.measure.report import measurement
from forerun.executors.session import Session
from forerun.model import Layer, Model
from forerun.planner import Pins, search


def llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> Model:
    """A decoder in the form of Llama with 32,000 words."""
    layer = Layer(
        repeat=layers, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, ffn_hidden=ffn
    )
    return Model(name=name, hidden=hidden, vocab=32_000, layers=(layer,))


MODELS = {
    "0.4b": llama("llama-like-0.4b", 24, 1024, 16, 8, 2816),
    "1.1b": llama("llama-like-1.1b", 22, 2048, 16, 4, 5632),
}
"""Those of no catalog: 0.3 to 1.1 B parameters without a large vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Plans that differ in their techniques alone."""

    name: str
    model: str
    """Of `MODELS`, or of the catalog."""
    seq_tokens: int
    micro_batch_seqs: int = 1
    num_microbatches: int = 2
    steps: int = 6
    warmup_steps: int = 3
    plans: tuple[Way, ...]


Way = dict[str, Any]
"""Axes of a plan that differ from plain bf16 with AdamW, as `Pins` names them; `optimizer`;
`searched` for what `forerun plan` makes of the job."""

COMPILED: Way = {"runtime": "compiled"}
FULL: Way = {"recompute": "full"}
SELECTIVE: Way = {"recompute": "selective"}
FP8: Way = {"precision": "fp8", "recipe": "coat"}
STORED: Way = {"activations": "fp8"}
LOW_STATES: Way = {"optimizer": "adamw_fp8"}
COAT: Way = FP8 | STORED | LOW_STATES
SEARCHED: Way = {"searched": True}


def memo(alpha: float) -> Way:
    """That share of the tokens' activations to the host, the rest computed again."""
    return {"offload": alpha, "offload_rest": "recompute"}


GROUPS = (
    Group(
        name="0.4b-2k", model="0.4b", seq_tokens=2048, micro_batch_seqs=16,
        plans=({}, COMPILED, SELECTIVE, FULL, LOW_STATES),
    ),
    Group(
        name="0.5b-2k", model="qwen2.5-0.5b", seq_tokens=2048, micro_batch_seqs=8,
        plans=({}, COMPILED),
    ),
    Group(
        name="1b-8k", model="llama-3.2-1b", seq_tokens=8192, micro_batch_seqs=2,
        plans=({}, COMPILED, SELECTIVE, FULL, FP8, STORED, COAT),
    ),
    Group(
        name="3b-8k", model="llama-3.2-3b", seq_tokens=8192, plans=({}, COMPILED, FULL, COAT),
    ),
    Group(
        name="7b-2k", model="llama-2-7b", seq_tokens=2048, num_microbatches=4,
        plans=(FULL, FULL | FP8 | LOW_STATES),
    ),
    Group(
        name="1.1b-32k", model="1.1b", seq_tokens=32_768, num_microbatches=1,
        plans=({}, FULL),
    ),
    Group(
        name="1.1b-72k", model="1.1b", seq_tokens=73_728, num_microbatches=1, steps=3,
        warmup_steps=2,
        plans=(FULL, memo(0.25), memo(0.5), SEARCHED),
    ),
    Group(
        name="longest", model="llama-3.2-1b", seq_tokens=75_776, num_microbatches=1, steps=3,
        warmup_steps=2, plans=(FULL,),
    ),
    Group(
        name="1.1x", model="llama-3.2-1b", seq_tokens=83_968, num_microbatches=1, steps=3,
        warmup_steps=2, plans=(FULL,),
    ),
)  # fmt: skip
"""`longest` is the answer of `forerun sweep --longest-context --model llama-3.2-1b --gpus 1xH200
--global-batch 256ktok`."""


@dataclass(kw_only=True)
class Result:
    """What one plan was predicted to take and took."""

    group: str
    label: str
    way: Way
    predicted_s: float
    """From the profile."""
    from_constants_s: float
    predicted_bytes: float
    fits: str
    measured_s: float | None = None
    measured_bytes: float | None = None
    error: str | None = None
    wall_s: float = 0.0
    terms: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def time_error(self) -> float:
        """Relative, of the profile's prediction."""
        assert self.measured_s is not None
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        """Relative."""
        assert self.measured_bytes is not None
        return self.predicted_bytes / self.measured_bytes - 1


def make_plan(group: Group, way: Way, gpus: str, profiled: bool) -> PlanFile:
    """A plan, priced with the machine's profile or without any."""
    model = MODELS.get(group.model) or load_model(group.model)
    cluster = load_cluster(gpus)
    if not profiled:
        cluster = msgspec.structs.replace(cluster, profile=None)
    axes = dict(way)
    workload = Workload(
        seq_tokens=group.seq_tokens,
        global_batch_seqs=group.num_microbatches * group.micro_batch_seqs,
        steps=group.steps,
        optimizer=axes.pop("optimizer", "adamw"),
        quality=("exact", "published"),
    )  # fmt: skip
    if axes.pop("searched", False):
        exact = msgspec.structs.replace(workload, quality=("exact",))
        plan = search(model, cluster, exact, Pins(run_only=True), keep=1).plans[0].plan
    else:
        pins = Pins(micro_batch=group.micro_batch_seqs, **axes)
        plan = fixed_plan(model, cluster, workload, pins)
    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))


Earlier = dict[tuple[str, str], dict[str, Any]]
"""Results by group and label."""


def measure(group: Group, way: Way, gpus: str, session: Session, earlier: Earlier) -> Result:
    """Run one plan, unless it was run before: then what was measured is held against today's
    prediction."""
    plain, profiled = (make_plan(group, way, gpus, there) for there in (False, True))
    predicted = profiled.estimate
    result = Result(
        group=group.name,
        label=profiled.label,
        way=way,
        predicted_s=predicted.step_s.median,
        from_constants_s=plain.estimate.step_s.median,
        predicted_bytes=predicted.peak_memory_bytes.median,
        fits=predicted.fits,
    )
    before = earlier.get((group.name, profiled.label))
    if before is not None:
        terms = predicted.memory_terms_bytes
        result.predicted_bytes = sum(n for name, n in terms.items() if name not in NOT_LIVE)
        result.measured_s, result.measured_bytes = before["measured_s"], before["measured_bytes"]
        result.terms = before["terms"]
        return result
    started = time.monotonic()
    try:
        ranks = session.run(profiled, steps=group.steps, warmup_steps=group.warmup_steps)
        measured = measurement(profiled.plan, profiled.label, ranks, {}, False)
    except ForerunError as error:
        result.error = str(error)
    else:
        found = diff(profiled, measured)
        result.measured_s = measured.step_s.median
        result.measured_bytes = found["memory"]["measured_bytes"]
        result.predicted_bytes = found["memory"]["predicted_bytes"]
        result.terms = found
    result.wall_s = time.monotonic() - started
    gc.collect()
    return result


def table_row(result: Result) -> str:
    """A row of the table."""
    start = f"| {result.group} | `{result.label}` "
    if result.measured_s is None or result.measured_bytes is None:
        return f"{start}| {result.error} |"
    constants = result.from_constants_s / result.measured_s - 1
    return (
        f"{start}| {result.measured_s * 1e3:.1f} | {constants:+.1%} | {result.time_error:+.1%} "
        f"| {result.measured_bytes / 2**30:.2f} | {result.predicted_bytes / 2**30:.2f} "
        f"| {result.memory_error:+.1%} |"
    )


def summary(results: Sequence[Result]) -> list[str]:
    """Medians, worst cases, and what choosing by prediction costs in each group."""
    ran = [result for result in results if result.measured_s is not None]
    if not ran:
        return ["no plan ran"]
    times = [abs(result.time_error) for result in ran]
    peaks = [abs(result.memory_error) for result in ran]
    lines = [
        f"{len(ran)} plans: step time median {statistics.median(times):.1%}, "
        f"worst {max(times):.1%}; peak memory median {statistics.median(peaks):.1%}, "
        f"worst {max(peaks):.1%}"
    ]
    for name in dict.fromkeys(result.group for result in ran):
        some = [result for result in ran if result.group == name]
        if len(some) > 1:
            first = min(some, key=lambda result: result.predicted_s)
            best = min(result.measured_s or 0.0 for result in some)
            lines.append(f"{name}: regret {(first.measured_s or 0.0) / best - 1:.1%}")
    failed = [result for result in results if result.measured_s is None]
    lines += [f"{result.group} {result.label}: {result.error}" for result in failed]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", default="1xH200")
    parser.add_argument("--groups", help="names with commas between; default: all")
    parser.add_argument("--after", type=Path, help="the JSON of an earlier run that goes on")
    parser.add_argument("--json", type=Path, help="write every result here, after each run")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    asked = parser.parse_args()
    names = asked.groups.split(",") if asked.groups else [group.name for group in GROUPS]
    unknown = set(names) - {group.name for group in GROUPS}
    if unknown:
        raise SystemExit(f"unknown groups: {', '.join(sorted(unknown))}")
    print("| group | plan | measured ms | constants | profile | measured GiB | predicted | error |")
    print("|---|---|---|---|---|---|---|---|")
    started = time.monotonic()
    earlier: Earlier = {}
    if asked.after is not None:
        for entry in json.loads(asked.after.read_text()):
            if entry["measured_s"] is not None:
                earlier[entry["group"], entry["label"]] = entry
    results: list[Result] = []
    todo = [(g, way) for g in GROUPS if g.name in names for way in g.plans]
    with Session() as session:
        for group, way in todo:
            if time.monotonic() - started > asked.time_limit:
                print(f"{group.name}: left out, out of time", file=sys.stderr)
                continue
            results.append(measure(group, way, asked.gpus, session, earlier))
            print(table_row(results[-1]), flush=True)
            if asked.json is not None:
                asked.json.write_text(json.dumps([asdict(result) for result in results]))
    print()
    print("\n".join(f"- {line}" for line in summary(results)))


if __name__ == "__main__":
    main()
