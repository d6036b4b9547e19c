"""The tensors of a layer by name: what a plan of recompute mode `tensors` may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from ..choices import TENSORS
from ..cluster import Pool
from ..errors import InputError, unknown_name
from ..model import Model
from ..plan import Setting
from .options import Options
from .piece_graphs import layer_graph
from .techniques.recompute import tensor_names


def layer_tensors(
    model: Model, group: int, options: Options, pool: Pool, *, sequence_parallel: bool
) -> tuple[str, ...]:
    """The tensors of a layer of `model.layers[group]` that can be kept, in the order in which its
    forward makes them; the first is its input."""
    plain = replace(options, recompute="none", keep=(), offload=0.0)
    return tensor_names(layer_graph(model, model.layers[group], plain, pool, sequence_parallel))


def only_own(
    model: Model, group: int, options: Options, pool: Pool, *, sequence_parallel: bool
) -> Options:
    """The options of a layer without names of tensors that it does not have."""
    if options.recompute != TENSORS:
        return options
    own = layer_tensors(model, group, options, pool, sequence_parallel=sequence_parallel)
    return replace(options, keep=tuple(name for name in options.keep if name in own))


def settings_of(
    model: Model, each: Sequence[Options], pool: Pool, *, sequence_parallel: bool
) -> tuple[Setting, ...]:
    """The settings of a plan whose layers have these options, in order."""
    groups = [group for group, layer in enumerate(model.layers) for _ in range(layer.repeat)]
    own: dict[tuple[int, Options], Options] = {
        (group, options): only_own(model, group, options, pool, sequence_parallel=sequence_parallel)
        for group, options in dict.fromkeys(zip(groups, each, strict=True))
    }
    of_layer = [own[pair] for pair in zip(groups, each, strict=True)]
    settings: list[Setting] = []
    for options, run in groupby(range(model.num_layers), key=of_layer.__getitem__):
        first, *rest = run
        last = rest[-1] if rest else first
        settings.append(Setting(layers=(first, last), techniques=options.techniques()))
    return tuple(settings)


def check_keep(model: Model, keep: Sequence[str], compute: str, pool: Pool) -> None:
    """Raise InputError for the name of a tensor that no layer of a model has."""
    if not keep:
        return
    if model.traced is not None:
        raise InputError("keep", ",".join(keep), "tensors of a traced module have no names",
                         "use --recompute none, selective or full")  # fmt: skip
    plain = Options(compute=compute)
    known: dict[str, None] = {}
    for group in range(len(model.layers)):
        for split in (False, True):
            known |= dict.fromkeys(
                layer_tensors(model, group, plain, pool, sequence_parallel=split)
            )
    for name in keep:
        if name not in known:
            raise unknown_name("keep", name, known)


def check_names(
    model: Model, each: Sequence[Options], pool: Pool, *, sequence_parallel: bool
) -> None:
    """Raise InputError where a layer group is to keep a tensor that it does not have; `each` are
    the options of `model.layers`."""
    for group, options in enumerate(each):
        if options.recompute != TENSORS:
            continue
        if model.traced is not None:
            raise InputError("recompute", TENSORS, "tensors of a traced module have no names",
                             "use none, selective or full")  # fmt: skip
        own = layer_tensors(model, group, options, pool, sequence_parallel=sequence_parallel)
        for name in options.keep:
            if name not in own:
                raise unknown_name("recompute.keep", name, own)
