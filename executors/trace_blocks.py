"""The blocks of a traced module: runs of equal neighbours in its containers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from . import aten
from .recorder import Recorder

WHOLE = ""
"""Path of the module itself."""


def typical_of(run: list[str]) -> str:
    """The block that stands for all of a run: one in the middle, with neighbours of its kind."""
    return run[len(run) // 2]


def find_runs(
    module: nn.Module, recorder: Recorder, container: str | None = None
) -> list[list[str]]:
    """Runs of equal neighbours in containers, outermost containers first, in calling order.

    With a `container` those of its children, all of which are blocks.
    """
    signature = {path: _signature(path, module, recorder) for path in recorder.entered}
    if container is not None:
        names = module.get_submodule(container).named_children()
        return _runs([f"{container}.{name}" for name, _ in names], signature)
    runs: list[list[str]] = []
    chosen: list[str] = []
    for path, child in module.named_modules():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)) or block_of(path, chosen):
            continue
        names = [f"{path}.{name}" if path else name for name, _ in child.named_children()]
        found = [run for run in _runs(names, signature) if len(run) > 1]
        runs += found
        chosen += [name for run in found for name in run]
    return runs or [[WHOLE]]


def _runs(names: list[str], signature: Mapping[str, object]) -> list[list[str]]:
    """Neighbours of equal signature; those without one belong to none."""
    runs: list[list[str]] = []
    last: object = None
    for name in names:
        mine = signature.get(name)
        if mine is not None and mine == last:
            runs[-1].append(name)
        elif mine is not None:
            runs.append([name])
        last = mine
    return runs


def _signature(path: str, module: nn.Module, recorder: Recorder) -> object:
    """What makes two submodules equal; None for one that is no block."""
    if recorder.entered[path] != 1:
        return None
    calls = [call for call in recorder.calls if block_of(call.module, [path]) is not None]
    if not calls:
        return None
    matmuls = tuple((c.name, c.sizes, tuple(w for w in c.backward if w[0] == aten.MATMUL))
                    for c in calls)  # fmt: skip
    parameters = module.get_submodule(path).named_parameters()
    return matmuls, tuple((name, tuple(p.shape), p.requires_grad) for name, p in parameters)


def block_of(path: str | None, blocks: Iterable[str]) -> str | None:
    """The block that holds a submodule; None for none."""
    if path is None:
        return None
    for block in blocks:
        if block == WHOLE or path == block or path.startswith(f"{block}."):
            return block
    return None
