"""forerun solve activations: keep, recompute, offload or compress each saved tensor."""

from __future__ import annotations

import re
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ... import units
from ...errors import InputError
from ..jobs import is_traced, trace_model
from ..log import say
from ..options import POSITIVE, common_options

if TYPE_CHECKING:
    from ...planner.activations import LayerType, PolicyUse, Solution

NEEDED = {
    "model": "write --model llama-2-7b, or give a CSV file of tensors",
    "gpus": "write --gpus 8xA100-80GB",
    "seq_len": "write --seq-len 8192",
}
SCALES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@click.command("activations")
@click.argument(
    "table_path", metavar="[TENSORS.csv]", required=False, type=click.Path(path_type=Path)
)
@click.option("--memory-limit", help="Device memory for saved tensors: 20GiB, 80GB, bytes.")
@click.option("--model", help="Catalog name, config.json or its folder, 7b, or package.module:f.")
@click.option("--gpus", help="8xA100-80GB, 384x8xH100, H100:8, 2xcpu, or a cluster TOML.")
@click.option("--seq-len", help="Tokens per sequence: 8192, 128k, 1M.")
@click.option(
    "--micro-batch", type=POSITIVE, default=1, show_default=True, help="Sequences per forward pass."
)
@click.option("--tp", type=POSITIVE, default=1, show_default=True, help="Tensor-parallel degree.")
@click.option("--sp/--no-sp", default=False, help="Sequence parallelism beside tp.")
@click.option("--pp", type=POSITIVE, default=1, show_default=True, help="Pipeline stages.")
@click.option("--cp", type=POSITIVE, default=1, show_default=True, help="Context-parallel degree.")
@click.option(
    "--attention",
    type=click.Choice(["flash", "unfused", "eager"]),
    default="flash",
    show_default=True,
    help="Attention kernel: fused, or with scores in memory.",
)
@click.option(
    "--layers",
    type=POSITIVE,
    help="Layers of the stage; default: the model's over pp, or 1 for a CSV file.",
)
@click.option(
    "--live-micro-batches",
    type=POSITIVE,
    help="Micro-batches between forward and backward; default: pp, as in 1F1B.",
)
@click.option("--host-limit", help="Host memory per device for offload: 100GiB; default: no limit.")
@click.option(
    "--copy-bandwidth",
    help="Bytes per second and device each way: 25GB/s; default: the hardware's.",
)
@click.option(
    "--forward-s",
    type=float,
    default=0.0,
    help="For a CSV file: seconds of a layer's forward that copies hide behind.",
)
@click.option("--backward-s", type=float, default=0.0, help="The same of its backward.")
@click.option("--allow-fp8", is_flag=True, help="Let tensors be stored in 8 bits.")
@click.option("--no-offload", is_flag=True, help="Move nothing to the host.")
@click.option(
    "--gap",
    type=float,
    default=1e-3,
    show_default=True,
    help="Relative gap at which the search stops; 0 proves the optimum.",
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Stop after this long and say what gap is left.",
)
@common_options
def command(as_json: bool, table_path: Path | None, **flags: Any) -> None:
    """Choose for each saved tensor of a stage: keep, recompute, offload a part, or compress.

    The stage is the first of --model on --gpus, or equal layers with the tensors of a CSV file
    (columns id, bytes, recompute_s, needs). Fewest extra seconds per micro-batch win.
    """
    from ...planner.activations import Limits, Problem, solve
    from .. import render

    if flags["memory_limit"] is None:
        raise InputError("memory-limit", "(missing)", "not given", "write --memory-limit 20GiB")
    layers, copy_bytes_per_s = _layers(table_path, flags)
    if flags["copy_bandwidth"] is not None:
        copy_bytes_per_s = parse_bytes("copy-bandwidth", flags["copy_bandwidth"].removesuffix("/s"))
    host = flags["host_limit"]
    limits = Limits(
        device_bytes=parse_bytes("memory-limit", flags["memory_limit"]),
        host_bytes=float("inf") if host is None else parse_bytes("host-limit", host),
        live_micro_batches=flags["live_micro_batches"] or flags["pp"],
        copy_bytes_per_s=0.0 if flags["no_offload"] else copy_bytes_per_s,
        compress=flags["allow_fp8"],
    )
    started = perf_counter()
    problem = Problem(layers=layers, limits=limits)
    solution = solve(problem, gap=flags["gap"], time_limit_s=flags["time_limit"])
    if as_json:
        render.print_json(solution.document(perf_counter() - started))
    else:
        print_solution(solution)


def parse_bytes(field: str, text: str) -> float:
    """Bytes as people write them.

    >>> parse_bytes("memory-limit", "20GiB"), parse_bytes("memory-limit", "1.5kB")
    (21474836480.0, 1500.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip(), re.IGNORECASE)
    if match is None or match.group(2).lower() not in SCALES:
        raise InputError(field, text, "not a number of bytes", "write 20GiB, 80GB or 1000000")
    return float(match.group(1)) * SCALES[match.group(2).lower()]


def _layers(table_path: Path | None, flags: dict[str, Any]) -> tuple[tuple[LayerType, ...], float]:
    """The layers of the stage and the rate of copies to the host."""
    from ...planner.activations import read_tensors

    if table_path is None:
        return _model_layers(flags)
    if flags["model"] is not None:
        raise InputError(
            "model", flags["model"], f"{table_path} already says what is saved", "drop one of them"
        )
    layer = read_tensors(
        table_path,
        layers=flags["layers"] or 1,
        forward_s=flags["forward_s"],
        backward_s=flags["backward_s"],
    )
    return (layer,), 0.0


def _model_layers(flags: dict[str, Any]) -> tuple[tuple[LayerType, ...], float]:
    for field, remedy in NEEDED.items():
        if flags[field] is None:
            raise InputError(field.replace("_", "-"), "(missing)", "not given", remedy)
    from ...catalogs import load_model, resolve_gpus
    from ...mesh import Mesh
    from ...planner.activations import first_stage

    seq_tokens = units.parse_tokens(flags["seq_len"])
    traced = is_traced(flags["model"])
    model = trace_model(flags, seq_tokens) if traced else load_model(flags["model"])
    resolved = resolve_gpus(flags["gpus"])
    for note in resolved.notes:
        say(f"note: {note}")
    world, inner = resolved.cluster.num_devices, flags["tp"] * flags["pp"] * flags["cp"]
    if world % inner:
        degrees = " * ".join(f"{axis}={flags[axis]}" for axis in ("tp", "pp", "cp"))
        raise InputError(
            "mesh", degrees, f"{inner} does not divide {world} devices", "change a degree or --gpus"
        )
    mesh = Mesh(dp_replicate=world // inner, cp=flags["cp"], tp=flags["tp"], pp=flags["pp"])
    stage = first_stage(
        model,
        resolved.cluster,
        mesh,
        seq_tokens=seq_tokens,
        micro_batch_seqs=flags["micro_batch"],
        sequence_parallel=flags["sp"],
        attention=flags["attention"],
        num_layers=flags["layers"],
    )
    link = resolved.cluster.pools[0].host
    return stage, 0.0 if link is None else link.bytes_per_s


def print_solution(solution: Solution) -> None:
    """Print every policy in use, tensor by tensor, then the totals."""
    from .. import render

    for use in solution.policies:
        print_use(use)
    show, gib = units.format_seconds, units.format_bytes
    render.print_line(
        f"device {gib(solution.device_bytes)} of {gib(solution.keep_all_bytes)} when all is kept, "
        f"host {gib(solution.host_bytes)}"
    )
    render.print_line(
        f"adds {show(solution.extra_s)} to a micro-batch; recomputing all adds "
        f"{show(solution.recompute_all_s)}"
    )
    if solution.gap == 0.0:
        render.print_line("gap 0 %: no choice adds less")
    else:
        stopped = f", stopped by the limit on {solution.limit}" if solution.limit else ""
        render.print_line(
            f"gap {100 * solution.gap:.2g} %: no choice adds less than "
            f"{show(solution.lower_bound_s)}{stopped}"
        )


def print_use(use: PolicyUse) -> None:
    """Print one policy: what its layers do with each tensor."""
    from .. import render

    rows = [
        [
            tensor.name,
            units.format_bytes(tensor.bytes),
            tensor.choice,
            render.percent(tensor.fraction) if tensor.fraction else "-",
            units.format_seconds(tensor.seconds) if tensor.seconds else "-",
        ]
        for tensor in use.tensors
        if tensor.bytes > 0
    ]
    title = f"{use.layers} x {use.layer}"
    render.print_table((title, "bytes", "choice", "on the host", "adds"), rows)
