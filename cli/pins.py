"""The axes that the user fixed, read as pins of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..choices import TENSORS
from ..errors import InputError
from ..model import Model
from .jobs import Job, is_traced
from .lora import parse_lora
from .offload import parse_offload
from .options import AXES
from .outer import parse_outer

if TYPE_CHECKING:
    from ..planner import Pins


def read_pins(flags: Mapping[str, Any]) -> Pins:
    """The axes that the user fixed, from the values of `AXIS_OPTIONS`."""
    from ..planner import Pins

    given: dict[str, Any] = {axis: flags[axis] for axis in AXES if axis not in ("offload", "lora")}
    given |= parse_offload(flags["offload"]) | parse_lora(flags["lora"])
    given["optimizer"] = flags.get("optimizer")
    given["local_sgd"] = parse_outer(flags.get("local_sgd"), flags.get("outer"))
    if given["keep"] is not None and given["recompute"] != TENSORS:
        raise InputError("keep", given["keep"], "names tensors for --recompute tensors alone",
                         "add --recompute tensors, or drop --keep")  # fmt: skip
    if given["keep"] is not None:
        given["keep"] = tuple(name for name in given["keep"].replace(" ", "").split(",") if name)
    if is_traced(flags["model"]):
        if flags["lora"] is not None:
            raise InputError("lora", flags["lora"], "a module of one's own says itself what trains",
                             "drop --lora, and freeze parameters in the module")  # fmt: skip
        given = {"offload": 0.0, **given, "cp": 1, "ep": 1}
        given["recompute"] = flags["recompute"] or "none"
        return Pins(**given)
    if given["recompute"] == "solve":
        given["recompute"] = None
    given["stages"] = parse_stages(given["stages"])
    return Pins(**given)


def parse_stages(text: str | None) -> tuple[int, ...] | Literal["even"] | None:
    """Layers of every stage, or "even".

    >>> parse_stages("9,8,8,7"), parse_stages("even"), parse_stages(None)
    ((9, 8, 8, 7), 'even', None)
    """
    if text is None:
        return None
    if text.strip().lower() == "even":
        return "even"
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError("stages", text, "not numbers of layers with commas between",
                         "write --stages 9,8,8,7, or even") from None  # fmt: skip


def search_pins(job: Job, flags: Mapping[str, Any]) -> Pins:
    """The pins of a search; on one node free axes take what can be run there, unless told, or
    unless a pin is beyond that already."""
    import msgspec

    (pool, *others) = job.cluster.pools
    run_only = flags["space"] == "run"
    beyond = bool(flags["offload"]) and not all(layer.is_plain for layer in job.model.layers)
    if flags["space"] is None and not others and pool.num_nodes == 1 and not beyond:
        run_only = can_be_executed(job.model)
    return msgspec.structs.replace(read_pins(flags), run_only=run_only)


def can_be_executed(model: Model) -> bool:
    """Whether `forerun run` has code for a model at all."""
    from ..executors.support import check_model

    try:
        check_model(model)
    except InputError:
        return False
    return True
