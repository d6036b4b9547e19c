"""Predicted against measured on this machine's processes: step time, memory, bytes on the wire.

Runs every plan family of a tiny Llama as real processes, each in several rounds that are
interleaved with the others, and writes the table into docs/accuracy.md. The prediction uses the
machine's profile (`forerun profile`) and nothing from these runs. The noise floor of a family is
the spread of its medians over the rounds.

A model with routed experts runs further families, with expert parallelism, and has a table of its
own. What tokens choose is not known without a run: a first one, of one process, gives the loads of
experts, and every plan with expert parallelism is predicted with these.

    python benchmarks/bench_cpu_families.py --model tiny-3m --rounds 3
    python benchmarks/bench_cpu_families.py --model tiny-moe-4m --rounds 3
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from forerun import Measurement, Mesh, Model, Plan, PlanFile, Workload
from forerun.catalogs import load_cluster, load_model
from forerun.costmodel import diff, estimate
from forerun.executors import run
from forerun.lengths import Lengths
from forerun.plan import Phase, Setting, even_stages, techniques
from forerun.planner import Pins, search
from forerun.planner.experts import expect_loads

SECONDS_PER_RUN = 20.0
"""Slow families take fewer steps."""

MARKS = {False: "cpu-families", True: "cpu-experts"}
"""Of the table, by whether the model has routed experts."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way to run the same batch."""

    processes: int
    micro_batch_seqs: int = 4
    compute: str = "fp32"
    recompute: str = "none"
    zero: int = 0
    sp: bool = False
    schedule: str = "1f1b"
    cp_kind: str | None = None
    packed: bool = False
    """Whether documents are packed into the sequences."""
    degrees: dict[str, int] = field(default_factory=dict)


FAMILIES = (
    Family(processes=1),
    Family(processes=1, micro_batch_seqs=2),
    Family(processes=1, recompute="full"),
    Family(processes=1, micro_batch_seqs=1, compute="bf16"),
    Family(processes=2, degrees={"dp_replicate": 2}),
    Family(processes=2, micro_batch_seqs=2, degrees={"dp_replicate": 2}),
    Family(processes=2, zero=1, degrees={"dp_shard": 2}),
    Family(processes=2, zero=2, degrees={"dp_shard": 2}),
    Family(processes=2, zero=3, degrees={"dp_shard": 2}),
    Family(processes=2, degrees={"tp": 2}),
    Family(processes=2, sp=True, degrees={"tp": 2}),
    Family(processes=2, schedule="gpipe", degrees={"pp": 2}),
    Family(processes=2, degrees={"pp": 2}),
    Family(processes=2, schedule="interleaved", degrees={"pp": 2, "vpp": 2}),
    Family(processes=2, schedule="zb-h1", degrees={"pp": 2}),
    Family(processes=2, schedule="zb-v", degrees={"pp": 2, "vpp": 2}),
    Family(processes=2, recompute="full", zero=3, degrees={"dp_shard": 2}),
    Family(processes=1, recompute="full_keep_attn"),
    Family(processes=2, packed=True, degrees={"dp_replicate": 2}),
    Family(processes=2, degrees={"cp": 2}),
    Family(processes=2, recompute="full_keep_attn", zero=3, degrees={"cp": 2}),
    Family(processes=2, cp_kind="ring", degrees={"cp": 2}),
    Family(processes=2, cp_kind="lightseq", recompute="full_keep_attn", degrees={"cp": 2}),
    Family(processes=2, cp_kind="ulysses", degrees={"cp": 2, "ulysses": 2}),
    Family(processes=2, packed=True, degrees={"cp": 2}),
    Family(processes=2, cp_kind="ulysses", packed=True, degrees={"cp": 2, "ulysses": 2}),
    Family(processes=4, degrees={"cp": 4, "ulysses": 2}),
    Family(processes=4, cp_kind="lightseq", degrees={"cp": 4}),
    Family(processes=4, degrees={"tp": 2, "dp_replicate": 2}),
    Family(processes=4, zero=3, degrees={"pp": 2, "dp_shard": 2}),
)

EXPERT_FAMILIES = (
    Family(processes=2, degrees={"dp_replicate": 2, "ep": 2}),
    Family(processes=2, micro_batch_seqs=2, recompute="full", degrees={"dp_replicate": 2, "ep": 2}),
    Family(processes=2, zero=1, degrees={"dp_shard": 2, "ep": 2}),
    Family(processes=2, zero=3, degrees={"dp_shard": 2, "ep": 2}),
    Family(processes=2, sp=True, degrees={"tp": 2, "ep": 2}),
    Family(processes=4, degrees={"dp_replicate": 4, "ep": 4}),
    Family(processes=4, zero=3, degrees={"dp_shard": 4, "ep": 2}),
    Family(processes=4, zero=1, degrees={"pp": 2, "dp_shard": 2, "ep": 2}),
    Family(processes=4, sp=True, degrees={"tp": 2, "dp_replicate": 2, "ep": 2}),
)


def has_experts(model: Model) -> bool:
    """Whether tokens of a model are routed."""
    return any(layer.experts is not None for layer in model.layers)


def make_plan(family: Family, model_name: str, workload: Workload) -> PlanFile:
    """The plan of a family, predicted with the machine's profile."""
    model, cluster = load_model(model_name), load_cluster(f"{family.processes}xcpu")
    mesh = Mesh(**family.degrees)
    chosen = techniques(family.compute, family.recompute)
    if family.cp_kind is not None:
        chosen["context-parallel"] = {"kind": family.cp_kind}
    if family.packed:
        quarter = workload.seq_tokens // 4
        lengths = Lengths.of("documents", [quarter // 4, quarter, 4 * quarter], "made up")
        workload = msgspec.structs.replace(workload, lengths=lengths)
    micro_batch = min(family.micro_batch_seqs, workload.global_batch_seqs // mesh.dp)
    phase = Phase(
        steps=workload.steps,
        seq_tokens=workload.seq_tokens,
        micro_batch_seqs=micro_batch,
        num_microbatches=workload.global_batch_seqs // micro_batch // mesh.dp,
        mesh=mesh,
        zero=family.zero,  # pyright: ignore[reportArgumentType]
        sequence_parallel=family.sp,
        schedule=family.schedule,  # pyright: ignore[reportArgumentType]
        stages=even_stages(model.num_layers, mesh.num_stages, cluster.pools[0].name),
        settings=(Setting(layers=(0, model.num_layers - 1), techniques=chosen),),
    )
    return predicted(Plan(model=model, cluster=cluster, workload=workload, phases=(phase,)))


def predicted(plan: Plan) -> PlanFile:
    """The plan with its estimate."""
    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))


def with_loads(file: PlanFile, loads: Measurement | None) -> PlanFile:
    """The plan predicted with the loads of experts that a run measured, where ranks share them."""
    if loads is None or file.plan.phase.mesh.ep == 1:
        return file
    return predicted(expect_loads(file.plan, loads))


def best_plan(model_name: str, workload: Workload, processes: int) -> PlanFile:
    """The plan that the planner ranks first."""
    model, cluster = load_model(model_name), load_cluster(f"{processes}xcpu")
    first = search(model, cluster, workload, Pins()).plans[0]
    return PlanFile(label=first.label, plan=first.plan, estimate=first.estimate)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One family: prediction, its measurements, the difference."""

    file: PlanFile
    runs: list[Measurement]

    @property
    def measured_s(self) -> float:
        """Median of the rounds' medians."""
        return statistics.median(m.step_s.median for m in self.runs)

    @property
    def step_error(self) -> float:
        """predicted / measured - 1."""
        return self.file.estimate.step_s.median / self.measured_s - 1

    @property
    def error_at_run_speed(self) -> float:
        """The median over the rounds of the error with the machine's drift taken out."""
        paces = [diff(self.file, run)["pace"] for run in self.runs]
        return statistics.median(pace["error"] if pace else self.step_error for pace in paces)

    @property
    def noise(self) -> float:
        """Spread of the rounds' medians."""
        medians = [m.step_s.median for m in self.runs]
        return (max(medians) - min(medians)) / self.measured_s

    @property
    def difference(self) -> dict[str, Any]:
        """Predicted against measured in the first round."""
        return diff(self.file, self.runs[0])

    @property
    def wire_equal(self) -> bool:
        """Whether every collective moved exactly the predicted bytes."""
        return self.file.estimate.bytes_on_wire == self.runs[0].bytes_on_wire


def table(rows: list[Row], model_name: str, best: dict[int, str]) -> list[str]:
    """The report in Markdown."""
    environment = rows[0].runs[0].environment
    profile = rows[0].file.plan.cluster.profile
    begin, end = marks(rows[0].file.plan.model)
    lines = [
        begin,
        f"Model {model_name}, {datetime.date.today()}, "
        f"{environment.get('cpu', 'cpu')}, {environment.get('cores', '?')} cores, "
        f"torch {environment.get('torch', '?')}; profile of {profile.date if profile else 'none'}. "
        f"{len(rows[0].runs)} interleaved rounds.",
        "",
        "`at speed`: the step's error with the prediction slowed or sped by the reference matmul",
        "during the run over that in the profile; `noise`: spread of the rounds' medians.",
        "",
        "| plan | predicted ms | measured ms | error | at speed | noise "
        "| predicted MiB | measured MiB | error | bytes on wire |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = row.difference["memory"]
        lines.append(
            f"| `{row.file.label}` | {row.file.estimate.step_s.median * 1e3:.1f} "
            f"| {row.measured_s * 1e3:.1f} | {row.step_error:+.1%} "
            f"| {row.error_at_run_speed:+.1%} | {row.noise:.1%} "
            f"| {memory['predicted_bytes'] / 2**20:.1f} | {memory['measured_bytes'] / 2**20:.1f} "
            f"| {memory['error']:+.1%} | {'equal' if row.wire_equal else 'DIFFERENT'} |"
        )
    steps = [abs(row.step_error) for row in rows]
    settled = [abs(row.error_at_run_speed) for row in rows]
    memories = [abs(row.difference["memory"]["error"]) for row in rows]
    floor = statistics.median(row.noise for row in rows)
    lines += [
        "",
        f"Step time: median error {statistics.median(steps):.1%}, worst {max(steps):.1%}; at the "
        f"run's speed median {statistics.median(settled):.1%}, worst {max(settled):.1%}. "
        f"Peak memory: median {statistics.median(memories):.1%}, worst {max(memories):.1%}. "
        f"Noise floor (median spread of one plan's medians): {floor:.1%}. Bytes on the wire equal "
        f"in {sum(row.wire_equal for row in rows)} of {len(rows)} families.",
        "",
    ]
    for processes, label in best.items():
        same = [r for r in rows if r.file.plan.phase.mesh.world == processes]
        fastest = min(same, key=lambda r: r.measured_s)
        chosen = next(r for r in same if r.file.label == label)
        lines.append(
            f"{processes} processes: ranked first `{label}` at {chosen.measured_s * 1e3:.1f} ms, "
            f"fastest measured `{fastest.file.label}` at {fastest.measured_s * 1e3:.1f} ms: "
            f"regret {chosen.measured_s / fastest.measured_s - 1:.1%}."
        )
    return [*lines, end]


def marks(model: Model) -> tuple[str, str]:
    """The lines between which a model's table stands."""
    name = MARKS[has_experts(model)]
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_report(path: Path, lines: list[str]) -> None:
    """Replace the report between its marks, its first and last line."""
    begin, end = lines[0], lines[-1]
    text = path.read_text() if path.exists() else f"# Accuracy\n\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(before + "\n".join(lines) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-3m")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", type=int, help="families of that many processes")
    parser.add_argument("--report", type=Path, default=Path("docs/accuracy.md"))
    options = parser.parse_args()
    workload = Workload(
        seq_tokens=options.seq_len, global_batch_seqs=options.global_batch, steps=options.steps
    )
    routed = has_experts(load_model(options.model))
    every = FAMILIES + (EXPERT_FAMILIES if routed else ())
    families = [f for f in every if options.only in (None, f.processes)]
    files = [make_plan(family, options.model, workload) for family in families]
    if routed:
        alone = make_plan(FAMILIES[0], options.model, workload)
        loads = run(alone, steps=options.steps, warmup_steps=3)
        files = [with_loads(file, loads) for file in files]
    best: dict[int, str] = {}
    for processes in sorted({f.processes for f in families}):
        chosen = best_plan(options.model, workload, processes)
        best[processes] = chosen.label
        if chosen.label not in {file.label for file in files}:
            files.append(chosen)
    runs: dict[str, list[Measurement]] = {file.label: [] for file in files}
    for turn in range(options.rounds):
        for file in files:
            affordable = round(SECONDS_PER_RUN / file.estimate.step_s.median)
            steps = min(options.steps, max(2, affordable))
            measured = run(file, steps=steps, warmup_steps=min(3, steps))
            runs[file.label].append(measured)
            print(
                f"round {turn + 1} {file.label}: predicted "
                f"{file.estimate.step_s.median * 1e3:.1f} ms, measured "
                f"{measured.step_s.median * 1e3:.1f} ms",
                file=sys.stderr,
                flush=True,
            )
    rows = [Row(file=file, runs=runs[file.label]) for file in files]
    lines = table(rows, options.model, best)
    write_report(options.report, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
