"""Counting collectives: how often, over which mesh axis, with how many bytes.

`CollectiveCounter` sees every collective that a rank issues while it is entered: those of c10d
(FSDP2, DDP's buckets, pipeline sends) and the functional ones (DTensor). Bytes are those of the
full logical buffer, whatever algorithm carries it: the gathered output of an all-gather, the input
of a reduce-scatter, the buffer of an all-reduce, the message of a send. Receives are listed (the
clock needs them) but not counted, groups of one rank are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...mesh import Mesh, reduced_over
from ..torch_compat import is_fake, operator_name, resolve_group

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
"""Collective by operator name, of the namespaces c10d and _c10d_functional."""

NAMESPACES = ("c10d", "_c10d_functional")

NAMED_GROUPS = {
    "ep": "ep",
    "expert_counts": "ep",
    "mesh_expert_shard": "dp",
    "mesh_expert_replicate": "dp",
    "mesh_expert_tp": "tp",
}
"""Axis by a group's description, where the ranks alone do not tell: those of the expert mesh borrow
the ranks of others."""


class Call(NamedTuple):
    """One collective as it was issued."""

    kind: str
    axis: str
    message_bytes: int


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def is_wrapped(types: Sequence[type]) -> bool:
    """Whether an operator got wrapper tensors (DTensor and the like), which desugar further."""
    plain = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return any(kind not in plain and not is_fake(kind) for kind in types)


def collective_kind(func: Any) -> str | None:
    """The collective an operator is, or None."""
    if func.namespace not in NAMESPACES:
        return None
    return KINDS.get(operator_name(func))


def axis_of(mesh: Mesh, ranks: Sequence[int]) -> str:
    """The axes along which the ranks of a group differ; both data-parallel axes are `dp`.

    >>> axis_of(Mesh(tp=2, dp_shard=2), [0, 2]), axis_of(Mesh(tp=2, dp_shard=2), [0, 1])
    ('dp', 'tp')
    """
    places = [mesh.coordinates(rank) for rank in ranks]
    varying = [axis for axis in Mesh.AXES if len({place[axis] for place in places}) > 1]
    return mesh.wire_name(varying)


def purpose(kind: str, axis: str) -> str:
    """The axis that a collective serves: ranks that share a sequence send and exchange for it, and
    reduce and gather as data-parallel ranks.

    >>> purpose("all_reduce", "dp+cp"), purpose("send", "cp")
    ('dp', 'cp')
    """
    own = ("send", "recv", "all_to_all")
    return axis if kind in own else reduced_over(axis)


def add_up(calls: Iterable[Call]) -> dict[str, float]:
    """Bytes by `collective@axis`, receives left out."""
    totals: dict[str, float] = {}
    for call in calls:
        if call.kind != "recv":
            name = f"{call.kind}@{call.axis}"
            totals[name] = totals.get(name, 0.0) + call.message_bytes
    return dict(sorted(totals.items()))


class CollectiveCounter(TorchDispatchMode):
    """Lists the collectives issued while entered, in order."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.calls: list[Call] = []

    def bytes_on_wire(self) -> dict[str, float]:
        """Bytes by `collective@axis`, receives left out."""
        return add_up(self.calls)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        kind = collective_kind(func)
        if kind is not None:
            self._count(func, kind, args)
        return out

    def _count(self, func: Any, kind: str, args: Sequence[Any]) -> None:
        group = _group(args)
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) > 1:
            message_bytes = _message_bytes(func, kind, args, len(ranks))
            named = NAMED_GROUPS.get(getattr(group, "group_desc", ""))
            axis = named or purpose(kind, axis_of(self.mesh, ranks))
            self.calls.append(Call(kind, axis, message_bytes))


def _group(args: Sequence[Any]) -> Any:
    """The process group of a collective, from its arguments.

    c10d operators take the group object, the first script object among their arguments; functional
    ones its name, their last argument.
    """
    for value in args:
        if isinstance(value, torch.ScriptObject):
            return dist.ProcessGroup.unbox(value)
    last = args[-1]
    return resolve_group(last) if isinstance(last, str) else last


def _message_bytes(func: Any, kind: str, args: Sequence[Any], num_ranks: int) -> int:
    """Bytes of the full logical buffer.

    In-place operators of c10d take (output, input) or the buffer first, functional ones their
    input. An all-gather's full buffer is `num_ranks` times its input, the others' the input itself.
    """
    paired = func.namespace == "c10d" and kind in ("all_gather", "reduce_scatter", "all_to_all")
    source = args[1] if paired else args[0]
    source_bytes = sum(t.numel() * t.element_size() for t in tensors_in(source))
    return source_bytes * num_ranks if kind == "all_gather" else source_bytes
