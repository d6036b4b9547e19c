"""Tables on a terminal, and JSON on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import document
from ..estimate import Estimate
from ..measurement import EMULATED_LINKS, ExpertLoad, Measurement
from ..plan import Plan, PlanFile
from ..units import GIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from ..costmodel import MemoryReport
    from ..planner import SearchResult, WhatIf
    from .jobs import Job

PIPED_WIDTH = 110
"""Columns when stdout is no terminal: a table keeps its lines whole in a file."""


def print_json(value: object) -> None:
    """Print one JSON document to stdout."""
    sys.stdout.write(document.to_json(value).decode())


def console() -> Console:
    """A console on stdout, without colour when piped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def print_line(text: str = "") -> None:
    """Print a line of the result, whole however narrow the terminal."""
    console().print(text, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table and an empty line: first column to the left, others to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    screen = console()
    screen.print(table)
    screen.print()


def percent(fraction: float | None, signed: bool = False) -> str:
    """A fraction for people; a dash when there is none.

    >>> percent(0.4213), percent(-0.02, signed=True), percent(None)
    ('42.1 %', '-2.0 %', '-')
    """
    if fraction is None:
        return "-"
    return f"{100 * fraction:+.1f} %" if signed else f"{100 * fraction:.1f} %"


def parameters(count: int) -> str:
    """A number of parameters for people.

    >>> parameters(6738415616), parameters(2461824)
    ('6.74 B parameters', '2.46 M parameters')
    """
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.2f} M parameters"


def print_job(job: Job) -> None:
    """Print what is trained on what, with the batch in both units."""
    work = job.workload
    devices = " + ".join(f"{p.num_devices:,} x {p.device.name}" for p in job.cluster.pools)
    print_line(
        f"{job.model.name} ({parameters(job.model.num_params)}) on {devices}, sequences of "
        f"{work.seq_tokens:,} tokens"
    )
    print_line(
        f"global batch {work.global_batch_seqs:,} sequences = {work.global_batch_tokens:,} tokens"
    )


PLAN_COLUMNS = (
    "#",
    "TP",
    "PP",
    "CP",
    "EP",
    "DP",
    "ZeRO",
    "MBS",
    "GBS",
    "seq",
    "tokens/s/GPU",
    "MFU",
    "GiB",
    "step ms",
)


def print_plans(plan_files: Sequence[PlanFile], lost: Sequence[str] = ()) -> None:
    """Print the layouts in the columns that people know, then their names and why they lost."""
    rows = [plan_row(index, p.plan, p.estimate) for index, p in enumerate(plan_files, start=1)]
    print_table(PLAN_COLUMNS, rows)
    for index, plan_file in enumerate(plan_files):
        reason = lost[index] if index < len(lost) else ""
        print_line(f"{index + 1}  {plan_file.label}" + (f"  ({reason})" if reason else ""))
    if any(plan_file.estimate.fits != "yes" for plan_file in plan_files):
        print_line("memory: ? may not fit, ! does not fit")
    print_line()


def plan_row(rank: int, plan: Plan, estimate: Estimate) -> list[str]:
    """One line of the table of plans."""
    phase = plan.phase
    mesh = phase.mesh
    pipeline = f"{mesh.pp}x{mesh.vpp}" if mesh.vpp > 1 else f"{mesh.pp}"
    hybrid = phase.zero and mesh.dp_replicate > 1
    data = f"{mesh.dp_replicate}x{mesh.dp_shard}" if hybrid else f"{mesh.dp}"
    per_device = estimate.tokens_per_s / plan.cluster.num_devices
    fits = {"yes": "", "marginal": " ?", "no": " !"}[estimate.fits]
    return [
        str(rank),
        f"{mesh.tp}" + ("+sp" if phase.sequence_parallel else ""),
        pipeline,
        str(mesh.cp),
        str(mesh.ep),
        data,
        str(phase.zero),
        str(phase.micro_batch_seqs),
        str(plan.workload.global_batch_seqs),
        str(phase.seq_tokens),
        f"{per_device:,.0f}",
        percent(estimate.mfu),
        f"{estimate.peak_memory_bytes.median / GIB:.2f}{fits}",
        f"{1e3 * estimate.step_s.median:,.1f}",
    ]


def print_terms(estimate: Estimate) -> None:
    """Print where the step's time and the peak's memory go, with their intervals and evidence."""
    step, peak = estimate.step_s, estimate.peak_memory_bytes
    rows = [
        [*row, estimate.evidence.get(row[0], "")]
        for row in _term_rows(estimate.time_terms_s, step.median, format_seconds)
    ]
    print_table(("time of a step", "", "share", "evidence"), rows)
    rows = _term_rows(estimate.memory_terms_bytes, peak.median, format_bytes)
    print_table(("memory at the peak", "", "share"), rows)
    print_line(
        f"step {format_seconds(step.median)} (90 %: {format_seconds(step.low)} to "
        f"{format_seconds(step.high)}), peak {format_bytes(peak.median)} of "
        f"{format_bytes(estimate.capacity_bytes)} per device, fits: {estimate.fits} "
        f"(probability {estimate.fit_probability:.2f})"
    )
    print_away(estimate.bytes_off_device, estimate.bytes_copied)


LARGEST_TENSORS = 12
"""Of those kept for backward, in the table."""


def print_memory(report: MemoryReport) -> None:
    """Print the peak of every pipeline rank, and what the fullest keeps for backward."""
    if len(report.ranks) > 1:
        largest = sorted(report.ranks[report.fullest].terms_bytes.items(), key=lambda x: -x[1])
        names = [name for name, value in largest if value > 0][:5]
        rows = [
            [str(r.rank), format_bytes(r.peak_bytes)]
            + [format_bytes(r.terms_bytes[name]) for name in names]
            for r in report.ranks
        ]
        print_table(("pipeline rank", "peak", *names), rows)
    kept = sorted(report.kept, key=lambda x: -abs(x.times * x.bytes))
    rows = [
        [x.piece, x.tensor, format_bytes(x.bytes), f"{x.times:g}"] for x in kept[:LARGEST_TENSORS]
    ]
    print_table(("kept for backward", "tensor", "one micro-batch", "pieces"), rows)


def _term_rows(
    terms: Mapping[str, float], total: float, show: Callable[[float], str]
) -> list[list[str]]:
    """Name, value and share of every term that matters."""
    return [
        [name, show(value), percent(value / total if total else None)]
        for name, value in terms.items()
        if value > 1e-6 * total  # not what rounding left
    ]


def print_quality(plan: Plan) -> None:
    """Print what a plan risks in quality, and on whose evidence."""
    from ..planner.quality import lines, risks

    for line in lines(risks(plan)):
        print_line(line)


def print_search(result: SearchResult) -> None:
    """Print what binds, and how far the winner can be from the best."""
    from ..planner import why

    print_line(why(result)[0])
    stats = result.stats
    if stats.proven:
        verdict = "gap 0 %: no layout is better in this cost model"
    else:
        verdict = f"gap {percent(stats.gap)}: a layout not simulated may be faster by up to that"
    limit = f", stopped by the {stats.limit} limit" if stats.limit else ""
    print_line(
        f"{verdict} ({stats.bounded:,} candidates bounded, {stats.simulated:,} simulated, "
        f"{stats.seconds:.2f} s{limit})"
    )


def print_what_if(changes: Sequence[WhatIf]) -> None:
    """Print what more of something would buy."""
    for change in changes:
        faster = "nothing" if change.gain < 0.0005 else f"{percent(change.gain)} faster"
        print_line(f"with {change.change}: {faster}")


def print_measurement(measurement: Measurement) -> None:
    """Print what a run did, in a few lines."""
    from ..costmodel.diff import emulated_as

    step, loss = measurement.step_s, measurement.loss
    emulation = emulated_as(measurement)
    if emulation is not None:
        print_line(emulation_line(emulation, measurement.step_s.median))
    rate = measurement.environment.get(EMULATED_LINKS)
    if rate is not None:
        print_line(f"emulated: nodes are processes of one machine, links between held to {rate}")
    print_line(f"{measurement.label}: {len(measurement.steps)} timed steps")
    print_line(
        f"step {format_seconds(step.median)} (p10 {format_seconds(step.p10)}, p90 "
        f"{format_seconds(step.p90)}), {measurement.tokens_per_s:,.0f} tokens/s"
    )
    print_line(
        f"peak {format_bytes(measurement.peak_memory_bytes)} of live tensors on the fullest rank, "
        f"{format_bytes(measurement.process_peak_bytes)} of process memory"
    )
    print_away(measurement.bytes_off_device, measurement.bytes_copied)
    if measurement.allocator:
        print_allocator(measurement.allocator)
    if loss:
        print_line(f"loss {loss[0]:.4f} -> {loss[-1]:.4f} over {len(loss)} steps")
    if measurement.experts:
        print_line(experts_line(measurement.experts))


def experts_line(experts: Sequence[ExpertLoad]) -> str:
    """How even the loads of experts were, in the worst layer.

    >>> load = ExpertLoad(layer=3, ep=2, tokens=(6, 2), imbalance=1.5, dropped=0.25)
    >>> experts_line([load])
    'experts: the hottest 1.50 x the mean, the fullest rank 1.50 x (layer 3), 25.0 % dropped'
    """
    hottest = max(
        max(load.tokens) * len(load.tokens) / max(1, sum(load.tokens)) for load in experts
    )
    fullest = max(experts, key=lambda load: load.imbalance)
    dropped = sum(load.dropped for load in experts) / len(experts)
    return (
        f"experts: the hottest {hottest:.2f} x the mean, the fullest rank "
        f"{fullest.imbalance:.2f} x (layer {fullest.layer}), {100 * dropped:.1f} % dropped"
    )


def print_away(off_device: Mapping[str, float], copied: Mapping[str, float]) -> None:
    """Print what waits off the device and what moves there and back, if anything does."""
    for tier, most in off_device.items():
        out, back = (copied.get(f"{way}@{tier}", 0.0) for way in ("out", "in"))
        print_line(
            f"{tier}: {format_bytes(most)} per rank off the device; per step "
            f"{format_bytes(out)} out, {format_bytes(back)} back"
        )


def print_allocator(found: Mapping[str, float]) -> None:
    """Print what allocators need for the tensors of one step."""
    live, static = found["max_live_bytes"], found["static_plan_bytes"]
    print_line(
        f"one step's tensors: {format_bytes(live)} live at most; solved offsets need "
        f"{format_bytes(static)} ({static / live:.4f} x), a caching allocator reserves "
        f"{format_bytes(found['caching_bytes'])} ({found['caching_bytes'] / live:.3f} x)"
    )
    if "arena_bytes" in found:
        whole = found["placed_bytes"] + found["not_placed_bytes"]
        print_line(
            f"ran out of an arena of {format_bytes(found['arena_bytes'])}: "
            f"{percent(found['placed_bytes'] / whole if whole else None)} of all bytes made"
        )


def print_diff(comparison: Mapping[str, Any]) -> None:
    """Print predicted against measured, term by term."""
    print_line(comparison["label"])
    if comparison["emulated"] is not None:
        print_line(emulation_line(comparison["emulated"], comparison["step"]["measured_s"]))
    rows = [diff_row(name, unit, *values) for name, unit, values in headline(comparison)]
    print_table(("", "predicted", "measured", "error"), rows)
    if comparison.get("pace"):
        print_line(pace_line(comparison["pace"]))
    for title, terms in grouped(comparison["terms"]):
        rows = [
            diff_row(t["term"], t["unit"], t["predicted"], t["measured"], t["error"]) for t in terms
        ]
        print_table((title, "predicted", "measured", "error"), rows)


def emulation_line(emulation: Mapping[str, Any], step_s: float) -> str:
    """That a run was paced, and how well it went.

    >>> known = {"device": "H100", "scale": 50.0, "late": 0.002, "simulated_step_s": 1.0}
    >>> print(emulation_line(known, 1.02))
    emulated: chunks held to the times of H100 on CPU processes, 50 x as slow, at most 0.2 % of a
    step late; step +2.0 % off the simulator's; memory is that of the CPU processes
    """
    error = step_s / emulation["simulated_step_s"] - 1 if emulation["simulated_step_s"] else None
    return (
        f"emulated: chunks held to the times of {emulation['device']} on CPU processes, "
        f"{emulation['scale']:.3g} x as slow, at most {percent(emulation['late'])} of a\n"
        f"step late; step {percent(error, signed=True)} off the simulator's; memory is that of the "
        "CPU processes"
    )


def pace_line(pace: Mapping[str, float]) -> str:
    """What the machine's own speed has to do with the step's error.

    >>> pace_line({"slowdown": 1.25, "error": -0.05})
    'the machine ran at 0.80 x its speed in the profile; at that speed the step error is -5.0 %'
    """
    return (
        f"the machine ran at {1 / pace['slowdown']:.2f} x its speed in the profile; "
        f"at that speed the step error is {100 * pace['error']:+.1f} %"
    )


def grouped(terms: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The terms of a diff that are not zero on both sides, by what they measure."""
    shown = [term for term in terms if term["predicted"] or term["measured"]]
    groups = [
        ("time of a step", [t for t in shown if t["unit"] == "s"]),
        ("memory at the peak", [t for t in shown if t["unit"] == "bytes" and "@" not in t["term"]]),
        ("bytes on the wire", [t for t in shown if "@" in t["term"]]),
    ]
    return [(title, group) for title, group in groups if group]


def headline(comparison: Mapping[str, Any]) -> list[tuple[str, str, tuple[Any, Any, Any]]]:
    """Name, unit and (predicted, measured, error) of the totals of a diff document."""
    step = comparison["step"]
    found = [("step time", "s", (step["predicted_s"], step["measured_s"], step["error"]))]
    for key, name in (("memory", "peak memory, live tensors"), ("process", "peak memory, process")):
        part = comparison[key]
        found.append(
            (name, "bytes", (part["predicted_bytes"], part["measured_bytes"], part["error"]))
        )
    return found


def diff_row(
    name: str, unit: str, predicted: float, measured: float, error: float | None
) -> list[str]:
    """One line of the table of a diff."""
    show = format_seconds if unit == "s" else format_bytes
    return [name, show(predicted), show(measured), percent(error, signed=True)]
