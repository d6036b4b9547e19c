"""When there is no plan: by how much, the smallest change that helps, which pins contradict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import msgspec

from ..cluster import Cluster, Pool
from ..costmodel.layout import Layouts
from ..document import Value
from ..errors import InputError
from ..estimate import Estimate
from ..layout_rules import layout_problems
from ..local_sgd import LocalSgd
from ..mesh import Mesh
from ..model import Model
from ..schedules import SCHEDULES
from ..workload import Workload
from .explain import in_gib
from .pins import Pins, flag, smallest_conflict
from .space import enumerate_grid

Ask = tuple[Model, Cluster, Workload, Pins]
FittingLabel = Callable[[Model, Cluster, Workload, Pins], "str | None"]
LARGEST_FACTOR = 64
DEVICES_PER_NODE = 8
"""A single node is filled up to here before a second one is proposed; assumed, the usual size."""


class Infeasible(Value, frozen=True, kw_only=True):
    """Why there is no plan, and what would make one possible."""

    reason: str
    smallest_change: str
    changes: tuple[str, ...] = ()
    """Single changes that each suffice, the smallest first."""


def why_nothing_fits(
    label: str, nearest: Estimate, ask: Ask, fitting_label: FittingLabel
) -> Infeasible:
    """By how much the nearest plan misses, and the single changes that would make one fit.

    `fitting_label` gives the label of a plan that fits a changed request, or None.
    """
    needed, capacity = nearest.peak_memory_bytes.median, nearest.capacity_bytes
    short = needed - capacity
    missing = f"short by {in_gib(short)}" if short > 0 else "too near the limit"
    reason = (
        f"{label} comes nearest: needs {in_gib(needed)} per device,"
        f" {in_gib(capacity)} usable, {missing}"
    )
    changes = tuple(_changes(ask, fitting_label))
    hopeless = (
        f"no single change helps (tried more devices and shorter sequences up to {LARGEST_FACTOR}x)"
    )
    return Infeasible(
        reason=reason, smallest_change=changes[0] if changes else hopeless, changes=changes
    )


def _changes(ask: Ask, fitting_label: FittingLabel) -> Iterator[str]:
    model, cluster, workload, pins = ask
    found: list[tuple[int, str]] = []
    for name, value in pins.given().items():
        if label := fitting_label(model, cluster, workload, pins.without(name)):
            found.append((1, f"leave {flag(name, value)} free ({label})"))
    if change := _first_that_fits(_more_devices(ask), fitting_label):
        factor, (_, more, _, _), label = change
        found.append((factor, f"--gpus {spelling(more)} ({label})"))
    shorter = list(_shorter(ask))
    # The shortest sequence needs the least memory: where it does not fit, none in between does.
    if shorter and fitting_label(*shorter[-1][1]):
        if change := _first_that_fits(shorter, fitting_label):
            factor, (_, _, less, _), label = change
            found.append((factor, f"--seq-len {less.seq_tokens} ({label})"))
    if not found:  # fewer sequences per step seldom help: micro-batches are small already
        if change := _first_that_fits(_smaller_batch(ask), fitting_label):
            factor, (_, _, less, _), label = change
            found.append((factor, f"--global-batch {less.global_batch_seqs} ({label})"))
    yield from (text for _, text in sorted(found, key=lambda change: change[0]))


def _first_that_fits(
    variants: Iterable[tuple[int, Ask]], fitting_label: FittingLabel
) -> tuple[int, Ask, str] | None:
    for factor, changed in variants:
        if label := fitting_label(*changed):
            return factor, changed, label
    return None


def _more_devices(ask: Ask) -> Iterator[tuple[int, Ask]]:
    """Twice, four times, ... the devices: a single node is filled first, then nodes are added; of
    several pools to each."""
    model, cluster, workload, pins = ask
    factor = 1
    while factor < LARGEST_FACTOR:
        factor *= 2
        pools = [doubled(pool, alone=len(cluster.pools) == 1) for pool in cluster.pools]
        if None in pools:
            return
        more = tuple(pool for pool in pools if pool is not None)
        cluster = msgspec.structs.replace(cluster, pools=more)
        yield factor, (model, cluster, workload, pins)


def doubled(pool: Pool, *, alone: bool) -> Pool | None:
    """Twice the devices of a pool; None where there is no network. An only node is filled first."""
    if pool.device.kind == "cpu":  # more processes share the same memory
        return None
    if alone and pool.num_nodes == 1 and pool.devices_per_node < DEVICES_PER_NODE:
        return msgspec.structs.replace(pool, devices_per_node=2 * pool.devices_per_node)
    if pool.inter_node is None:
        return None
    return msgspec.structs.replace(pool, num_nodes=2 * pool.num_nodes)


def _shorter(ask: Ask) -> Iterator[tuple[int, Ask]]:
    model, cluster, workload, pins = ask
    factor = 2
    while factor <= LARGEST_FACTOR and workload.seq_tokens % factor == 0:
        changed = msgspec.structs.replace(workload, seq_tokens=workload.seq_tokens // factor)
        yield factor, (model, cluster, changed, pins)
        factor *= 2


def _smaller_batch(ask: Ask) -> Iterator[tuple[int, Ask]]:
    model, cluster, workload, pins = ask
    factor = 2
    while factor <= LARGEST_FACTOR and workload.global_batch_seqs % factor == 0:
        seqs = workload.global_batch_seqs // factor
        changed = msgspec.structs.replace(workload, global_batch_seqs=seqs)
        yield factor, (model, cluster, changed, pins)
        factor *= 2


def spelling(cluster: Cluster) -> str:
    """Nodes, devices and kind as `--gpus` takes them: `8xH100`, `4x8xH100`, `8xH100+8xA100`."""
    return "+".join(map(_spelled, cluster.pools))


def _spelled(pool: Pool) -> str:
    nodes = f"{pool.num_nodes}x" if pool.num_nodes > 1 else ""
    return f"{nodes}{pool.devices_per_node}x{pool.device.name}"


def contradiction(model: Model, cluster: Cluster, workload: Workload, pins: Pins) -> InputError:
    """The InputError for pins that leave no legal layout: names the fewest that contradict."""

    def possible(some: Pins) -> bool:
        return len(enumerate_grid(model, cluster, workload, some)) > 0

    names = smallest_conflict(pins, possible)
    if not names:
        return _impossible_batch(model, cluster, workload)
    last = names[-1]
    others = names[:-1]
    free = enumerate_grid(model, cluster, workload, pins.only(others))
    allowed = f"{_flag_name(last)} can be {_values(free, last)}"
    given = {name: getattr(pins, name) for name in names}
    if not others:
        problem = (
            _indivisible(cluster, workload, last, given[last])
            or _first_rule_broken(model, workload, last, given[last])
            or f"no legal layout of {model.name} on {cluster.num_devices} devices has it"
        )
        value = _shown(given[last])
        return InputError(_flag_name(last), value, problem, f"{allowed}, or leave it free")
    flags = " ".join(flag(name, value) for name, value in given.items())
    return InputError(
        ", ".join(_flag_name(name) for name in names),
        ", ".join(map(_shown, given.values())),
        f"contradict each other: no legal layout of {model.name} on {cluster.num_devices} devices"
        f" has {flags}",
        f"leave one free; with the others kept, {allowed}",
    )


def _shown(value: object) -> str:
    """A pinned value as it is typed."""
    if isinstance(value, LocalSgd):
        return value.label
    if isinstance(value, tuple):
        return ",".join(map(str, cast("tuple[int, ...]", value)))
    return str(value)


def _indivisible(cluster: Cluster, workload: Workload, name: str, value: int) -> str | None:
    world, seqs = cluster.num_devices, workload.global_batch_seqs
    if name in ("tp", "pp", "dp", "dp_shard") and world % value:
        return f"does not divide {world} devices"
    if name in ("dp", "dp_shard", "micro_batch") and seqs % value:
        return f"does not divide the global batch of {seqs} sequences"
    return None


def _first_rule_broken(model: Model, workload: Workload, name: str, value: int) -> str | None:
    if name == "local_sgd":
        return "needs replicas that are no part of a pipeline, nor share sequences or experts"
    if name not in ("tp", "pp"):
        return None
    problems = layout_problems(
        model,
        Mesh(tp=value if name == "tp" else 1, pp=value if name == "pp" else 1),
        seq_tokens=workload.seq_tokens,
        zero=0,
        sequence_parallel=False,
        schedule="gpipe",
        num_microbatches=1,
    )
    return next((problem.problem for problem in problems), None)


_COLUMNS = {"sp": "sequence_parallel", "micro_batch": "micro_batch_seqs"}


def _values(grid: Layouts, name: str) -> str:
    """The values of an axis in a grid, as text."""
    if name == "local_sgd":
        return "left out"
    if name == "dp":
        column = grid.replicas
    elif name == "stages":
        column = grid.pp * grid.vpp
    else:
        column = getattr(grid, _COLUMNS.get(name, name))
    values = sorted({int(value) for value in column})
    if name == "sp":
        return ", ".join("on" if value else "off" for value in values)
    if name == "schedule":
        return ", ".join(SCHEDULES[value] for value in values)
    shown = ", ".join(str(value) for value in values[:12])
    shown += ", ..." if len(values) > 12 else ""
    return f"of {shown} stages" if name == "stages" else shown


def _flag_name(name: str) -> str:
    return name.replace("_", "-")


def _impossible_batch(model: Model, cluster: Cluster, workload: Workload) -> InputError:
    world, seqs = cluster.num_devices, workload.global_batch_seqs
    multiple = -(-seqs // world) * world
    return InputError(
        "global-batch",
        seqs,
        f"no layout of {model.name} on {world} devices divides it",
        f"give a multiple of the devices, such as --global-batch {multiple}",
    )
