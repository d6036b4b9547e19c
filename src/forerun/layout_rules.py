"""The rules that a layout keeps: what each axis of a mesh divides, and what schedules ask for."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import InputError
from .mesh import Mesh
from .model import Layer, Model
from .schedules import LOOPED_SCHEDULES, SPLIT_SCHEDULES, V_SCHEDULES
from .traced import Traced

UNDIVIDED = (
    ("conv", "convolutions", ("tp", "cp")),
    ("cross_decoder", "attention over an encoder's output", ("cp",)),
)
"""Layer kinds, in words, and the axes that cannot divide them."""


def layout_problems(
    model: Model,
    mesh: Mesh,
    *,
    seq_tokens: int,
    zero: int,
    sequence_parallel: bool,
    schedule: str,
    num_microbatches: int,
    own_orders: bool = False,
) -> Iterator[InputError]:
    """Every rule that a layout breaks, as errors in the user's words; none when it is legal.

    Orders of one's own need not keep to the micro-batches that their schedule asks for.
    """
    tp = mesh.tp
    if model.traced is not None:
        yield from _traced_problems(model.traced, mesh, sequence_parallel, schedule)
    for layer in model.layers if model.traced is None else ():
        for what, size in (
            ("attention heads", layer.heads),
            ("key-value heads", layer.kv_heads),
            *(("ffn width", width) for width in layer.mlp_widths),
        ):
            if size % tp:
                allowed = ", ".join(str(n) for n in _divisors(size)[:8])
                yield InputError("tp", tp, f"does not divide {size} {what} of {model.name}",
                                 f"use one of {allowed} or leave tp free")  # fmt: skip
    if model.vocab % tp and model.traced is None:
        yield InputError("tp", tp, f"does not divide the vocabulary {model.vocab} of {model.name}",
                         "pad the vocabulary or lower tp")  # fmt: skip
    if sequence_parallel and tp == 1:
        yield InputError("sp", "on", "needs tp > 1", "drop --sp or raise --tp")
    for tokens in model.lengths(seq_tokens):
        if sequence_parallel and (tokens // mesh.cp) % tp:
            yield InputError("sp", "on", f"tp={tp} does not divide the sequence {tokens}",
                             "use --no-sp or another length")  # fmt: skip
        if tokens % (2 * mesh.cp if mesh.cp > 1 else 1):
            yield InputError("cp", mesh.cp, f"2*cp does not divide the sequence {tokens}",
                             "use another length or cp")  # fmt: skip
    for kind, what, axes in UNDIVIDED:
        for axis in axes if any(layer.kind == kind for layer in model.layers) else ():
            if getattr(mesh, axis) > 1:
                problem = f"{model.name} has {what}, which {axis} does not divide"
                yield InputError(axis, getattr(mesh, axis), problem, f"drop --{axis}")
    if mesh.num_stages > model.num_layers:
        yield InputError("pp", f"{mesh.pp} x vpp {mesh.vpp}",
                         f"more stages than the {model.num_layers} layers of {model.name}",
                         "lower pp or vpp")  # fmt: skip
    if mesh.vpp > 1 and mesh.pp == 1:
        yield InputError("vpp", mesh.vpp, "needs pp > 1", "drop vpp or raise pp")
    yield from _chunk_problems(mesh, schedule)
    if mesh.pp > 1 and not own_orders:
        yield from _microbatch_problems(mesh, schedule, num_microbatches)
    if mesh.dp_shard > 1 and zero == 0:
        yield InputError("zero", 0, f"dp_shard={mesh.dp_shard} shards states",
                         "use --zero 1, 2 or 3, or dp_replicate")  # fmt: skip
    yield from _expert_problems(model, mesh, sequence_parallel)
    for layer in model.layers:
        if mesh.ulysses > 1:
            yield from _ulysses_problems(model, layer, mesh)


def _traced_problems(
    traced: Traced, mesh: Mesh, sequence_parallel: bool, schedule: str
) -> Iterator[InputError]:
    """What a user's module says of how it can be divided."""
    degrees = traced.divided.degrees if traced.divided is not None else ()
    if mesh.tp > 1 and not degrees:
        yield InputError("tp", mesh.tp, f"{traced.target} has no tp_plan that it can be cut by",
                         "give it one (docs/modules.md), or use --tp 1")  # fmt: skip
    elif mesh.tp > 1 and mesh.tp not in degrees:
        allowed = ", ".join(map(str, degrees))
        yield InputError("tp", mesh.tp, f"{traced.target} does not run cut in so many parts",
                         f"use one of {allowed}")  # fmt: skip
    if sequence_parallel:
        yield InputError("sp", "on", "a module of one's own keeps its sequence whole", "drop --sp")
    if mesh.pp > 1 and not traced.hidden:
        yield InputError("pp", mesh.pp,
                         f"{traced.target} has no pp_plan by which it could be staged",
                         "give it one (docs/modules.md), or use --pp 1")  # fmt: skip
    if mesh.pp > 1 and schedule in SPLIT_SCHEDULES:
        yield InputError("schedule", schedule,
                         "does not split the backward of a module of one's own",
                         "use gpipe, 1f1b or interleaved")  # fmt: skip
    for axis in ("cp", "ep"):
        if getattr(mesh, axis) > 1:
            yield InputError(axis, getattr(mesh, axis), "does not divide a module of one's own",
                             f"drop --{axis}")  # fmt: skip


def _chunk_problems(mesh: Mesh, schedule: str) -> Iterator[InputError]:
    """Each schedule has its number of chunks per rank."""
    chunked = schedule in (*LOOPED_SCHEDULES, *V_SCHEDULES)
    if mesh.vpp > 1 and not chunked:
        yield InputError("vpp", mesh.vpp, f"schedule {schedule} has one chunk per rank",
                         "use --schedule interleaved")  # fmt: skip
    if mesh.pp == 1:
        if schedule in SPLIT_SCHEDULES:
            yield InputError("schedule", schedule, "needs pp > 1", "raise --pp or use 1f1b")
        return
    if schedule in V_SCHEDULES and mesh.vpp != 2:
        yield InputError("schedule", schedule, f"has two chunks per rank, not vpp={mesh.vpp}",
                         "use --vpp 2")  # fmt: skip
    if schedule in LOOPED_SCHEDULES and mesh.vpp == 1:
        yield InputError("schedule", schedule, "needs vpp of 2 or more", "raise --vpp or use 1f1b")


def _microbatch_problems(mesh: Mesh, schedule: str, num_microbatches: int) -> Iterator[InputError]:
    """Each schedule has its least number of micro-batches."""
    least = {"gpipe": 1, "dualpipev": 2 * mesh.pp}.get(schedule, mesh.pp)
    if num_microbatches < least:
        of_pp = f"2*pp={least}" if least > mesh.pp else f"pp={mesh.pp}"
        yield InputError("num_microbatches", num_microbatches, f"{schedule} needs {of_pp} or more",
                         "lower the micro-batch or pp, or use gpipe")  # fmt: skip
    if schedule in LOOPED_SCHEDULES and num_microbatches % mesh.pp:
        problem = f"{schedule} needs a multiple of pp={mesh.pp}"
        yield InputError("num_microbatches", num_microbatches, problem, "change the micro-batch")


def _expert_problems(model: Model, mesh: Mesh, sequence_parallel: bool) -> Iterator[InputError]:
    """Experts are shared out evenly, tokens routed once, and states divided into equal parts."""
    if mesh.ep > 1 and not any(layer.experts for layer in model.layers):
        yield InputError("ep", mesh.ep, f"{model.name} has no experts", "drop --ep")
    for layer in model.layers:
        if layer.experts is not None and layer.experts.num_experts % mesh.ep:
            yield InputError("ep", mesh.ep,
                             f"does not divide {layer.experts.num_experts} experts of {model.name}",
                             "give a divisor")  # fmt: skip
    if mesh.tp > mesh.expert_tp and not sequence_parallel:
        yield InputError("ep", mesh.ep, f"lies over tp={mesh.tp}, whose ranks then route a part of "
                         "the sequence each", "add --sp, or let ep divide dp*cp")  # fmt: skip
    sharing = mesh.dp_shard * mesh.cp * mesh.tp // mesh.expert_tp
    if sharing % mesh.ep and mesh.ep % sharing:
        yield InputError("ep", mesh.ep, f"neither divides nor is a multiple of the {sharing} ranks "
                         "that share states", "change ep or dp_shard")  # fmt: skip


def _ulysses_problems(model: Model, layer: Layer, mesh: Mesh) -> Iterator[InputError]:
    """Each ulysses rank gets whole heads; those of K and V are repeated where they are fewer."""
    if layer.heads % (mesh.tp * mesh.ulysses):
        problem = f"tp*ulysses does not divide {layer.heads} attention heads of {model.name}"
        yield InputError("ulysses", mesh.ulysses, problem, "lower ulysses or tp")
    groups = layer.kv_heads // mesh.tp
    if groups and groups % mesh.ulysses and mesh.ulysses % groups:
        problem = f"neither divides nor repeats {groups} key-value heads per tp rank"
        yield InputError("ulysses", mesh.ulysses, problem, "give a divisor or a multiple")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
