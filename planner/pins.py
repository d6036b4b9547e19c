"""Pins: the axes of the search that the user has fixed; everything else stays free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, cast

import msgspec

from ..choices import (
    ATTENTION_KERNELS,
    COMPUTE_DTYPES,
    KINDS_OF_CP,
    OFFLOAD_RESTS,
    OFFLOAD_STATES,
    RECIPES,
    RECOMPUTE_MODES,
    RUNTIMES,
    STORAGE_DTYPES,
    TENSORS,
    TIERS,
)
from ..cluster import Device
from ..costmodel.options import Options
from ..costmodel.techniques import halo
from ..costmodel.techniques.lora import BASES, TARGETS
from ..document import Value
from ..errors import InputError
from ..local_sgd import LocalSgd
from ..model import Model
from ..schedules import SCHEDULES
from ..workload import Optimizer
from .quality import LOW_COMPUTE


class Pins(Value, frozen=True, kw_only=True):
    """One value per axis; None leaves the axis to the search."""

    tp: int | None = None
    sp: bool | None = None
    """Sequence parallelism; True needs tp > 1."""
    pp: int | None = None
    vpp: int | None = None
    """Model chunks per pipeline rank; above 1 the schedule is an interleaved one or a V."""
    schedule: str | None = None
    dp: int | None = None
    """All data-parallel replicas: dp_replicate * dp_shard."""
    dp_shard: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    """Sequences per replica in one forward pass."""
    recompute: str | None = None
    precision: str | None = None
    """Dtype of the matmuls."""
    recipe: str | None = None
    """Scaling of matmuls below 16 bits."""
    optimizer: Optimizer | None = None
    """In place of the workload's; free means that, or AdamW with moments of fewer bits where
    classes of quality allow it."""
    activations: str | None = None
    """Storage dtype of saved activations; free means that of the tensors."""
    cp: int | None = None
    cp_kind: str | None = None
    """How cp cuts the sequence: one of `KINDS_OF_CP`."""
    ep: int | None = None
    keep: tuple[str, ...] | None = None
    """Tensors kept under recompute `tensors`."""
    offload: float | None = None
    """Fraction of saved activations that waits off the device."""
    offload_rest: str | None = None
    """What becomes of the others: keep, recompute."""
    offload_tier: str | None = None
    """Where offloaded tensors wait: host, disk."""
    offload_states: str | None = None
    """What else waits there: optimizer, parameters."""
    attention: str | None = None
    """Kernel of the attention core; free means flash."""
    runtime: str | None = None
    """How layers are launched, eager or compiled; free means eager."""
    local_sgd: LocalSgd | None = None
    """How replicas that train apart meet; free means that they are one in every step, or, where the
    workload allows it, what hides a slow link."""
    lora: int | None = None
    """Rank of adapters; free means that all weights train."""
    lora_targets: str | None = None
    """Linears of a layer that get one: all, qkv, qv."""
    lora_base: str | None = None
    """Storage of the frozen weights; free means as matmuls use them."""
    stages: tuple[int, ...] | Literal["even"] | None = None
    """Layers of every pipeline stage, or as even as can be; free means the best cut."""
    run_only: bool = False
    """Not an axis: whether free axes take only what `forerun run` executes."""

    def given(self) -> dict[str, Any]:
        """The axes that are fixed, in the order of the fields.

        >>> Pins(pp=2, tp=4).given()
        {'tp': 4, 'pp': 2}
        """
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        del fields["run_only"]
        return {name: value for name, value in fields.items() if value is not None}

    def only(self, names: Iterable[str]) -> Pins:
        """The same pins with every axis but `names` free."""
        kept = {name: getattr(self, name) for name in names}
        return Pins(run_only=self.run_only, **kept)

    def without(self, name: str) -> Pins:
        """The same pins with axis `name` free."""
        return msgspec.structs.replace(self, **{name: None})


def flag(name: str, value: object) -> str:
    """An axis and its value as they are typed on the command line.

    >>> flag("micro_batch", 2), flag("sp", False)
    ('--micro-batch 2', '--no-sp')
    """
    if name == "sp":
        return "--sp" if value else "--no-sp"
    if name == "offload_states":
        return f"--offload {value}"
    if isinstance(value, LocalSgd):
        return local_sgd_flag(value)
    if name.startswith("lora_"):
        return f"--lora {name.removeprefix('lora_')}={value}"
    if name.startswith("offload_"):
        return f"--offload {name.removeprefix('offload_')}={value}"
    if isinstance(value, tuple):
        value = ",".join(map(str, cast("tuple[int, ...]", value)))
    return f"--{name.replace('_', '-')} {value}"


def local_sgd_flag(local: LocalSgd) -> str:
    """How replicas meet, as it is typed.

    >>> local_sgd_flag(LocalSgd(period=50, bits=4))
    '--local-sgd 50 --outer diloco,bits=4'
    """
    rest = {k: v for k, v in local.settings().items() if k not in ("period", "outer")}
    words = [local.outer, *(f"{name}={value}" for name, value in rest.items())]
    return f"--local-sgd {local.period} --outer {','.join(words)}"


def check_pins(pins: Pins, devices: Sequence[Device]) -> None:
    """Raise InputError for a value that no layout of any model could have."""
    for name in ("tp", "pp", "vpp", "dp", "dp_shard", "micro_batch", "cp", "ep"):
        degree = getattr(pins, name)
        if degree is not None and degree < 1:
            raise InputError(name.replace("_", "-"), degree, "not positive", "give 1 or more")
    if isinstance(pins.stages, tuple) and min(pins.stages, default=0) < 1:
        raise InputError("stages", ",".join(map(str, pins.stages)), "a stage without a layer",
                         "give every stage 1 or more")  # fmt: skip
    _check_choice("zero", pins.zero, (0, 1, 2, 3))
    _check_choice("schedule", pins.schedule, SCHEDULES)
    _check_choice("recompute", pins.recompute, (*RECOMPUTE_MODES, TENSORS))
    _check_choice("cp_kind", pins.cp_kind, KINDS_OF_CP)
    _check_choice("attention", pins.attention, ATTENTION_KERNELS)
    _check_choice("runtime", pins.runtime, RUNTIMES)
    _check_choice("precision", pins.precision, COMPUTE_DTYPES)
    _check_choice("recipe", pins.recipe, RECIPES)
    _check_choice("activations", pins.activations, STORAGE_DTYPES)
    check_precision(pins)
    if pins.offload is not None and not 0.0 <= pins.offload <= 1.0:
        raise InputError("offload", pins.offload, "not a fraction of the saved activations",
                         "give 0 to 1")  # fmt: skip
    _check_choice("offload_rest", pins.offload_rest, OFFLOAD_RESTS)
    _check_choice("offload_tier", pins.offload_tier, TIERS)
    _check_choice("offload_states", pins.offload_states, OFFLOAD_STATES)
    _check_choice("lora_targets", pins.lora_targets, ("all", *TARGETS))
    _check_choice("lora_base", pins.lora_base, BASES)
    for device in devices:
        if pins.precision is not None and not has_rate(device, pins.precision):
            known = ", ".join(d for d in COMPUTE_DTYPES if has_rate(device, d))
            raise InputError("precision", pins.precision, f"{device.name} has no such rate",
                             f"use one of {known}, or another device")  # fmt: skip


def check_stages(pins: Pins, model: Model) -> None:
    """Raise InputError for stages that do not hold the layers of a model."""
    if not isinstance(pins.stages, tuple):
        return
    total, text = sum(pins.stages), ",".join(map(str, pins.stages))
    if total != model.num_layers:
        raise InputError("stages", text, f"are {total} layers, {model.name} has {model.num_layers}",
                         "give every stage its number of layers")  # fmt: skip


def check_precision(pins: Pins) -> None:
    """Raise InputError for precision, recipe and storage that do not go together."""
    low = pins.precision in LOW_COMPUTE
    if pins.recipe is not None and not low:
        raise InputError("recipe", pins.recipe, "scales matmuls below 16 bits, and there are none",
                         f"add --precision {LOW_COMPUTE[0]}, or drop it")  # fmt: skip
    if low and pins.precision is not None:
        halo.check(pins.precision, recipe_of(pins))
    if pins.activations is None:
        return
    if low and recipe_of(pins) in ("tensorwise", "rowwise", *halo.LEVELS):
        raise InputError("recipe", recipe_of(pins), "says itself what inputs of matmuls are kept",
                         "use --recipe coat, or drop --activations")  # fmt: skip
    if pins.recompute not in (None, "none", "selective"):
        raise InputError("activations", pins.activations,
                         f"recompute {pins.recompute} does not keep the activations to be stored",
                         "use --recompute none or selective")  # fmt: skip


def recipe_of(pins: Pins) -> str:
    """The scaling of matmuls: as pinned; else for int8, fp6 and fp4 the level of HALO that is meant
    for them, coat where operands are stored, tensorwise."""
    if pins.recipe is None and pins.precision in halo.COMPUTE:
        return "halo2"
    stored = pins.activations is not None and pins.precision in LOW_COMPUTE
    return pins.recipe or ("coat" if stored else "tensorwise")


def pinned_options(pins: Pins, compute: str) -> Options:
    """What pins say of every layer, and the plain choice where they say nothing; what layers keep
    and how much of it leaves the device is chosen by whoever asks."""
    return Options(
        compute=compute,
        recipe=recipe_of(pins),
        activations=pins.activations,
        attention=pins.attention or "flash",
        runtime=pins.runtime or "eager",
        cp_kind=pins.cp_kind if pins.cp_kind in ("ring", "lightseq") else "zigzag",
        keep=pins.keep or (),
        offload_rest=pins.offload_rest or "keep",
        offload_tier=pins.offload_tier or "host",
        offload_states=pins.offload_states,
        lora_rank=pins.lora,
        lora_targets=pins.lora_targets or "all",
        base_dtype=pins.lora_base,
        local_sgd=pins.local_sgd,
    )


RATE_OF = {"mxfp8": "fp8", "nvfp4": "fp4", "fp6": "bf16", "fp4": "bf16"}
"""The rate that a compute dtype runs at, where it has another name."""


def has_rate(device: Device, compute: str) -> bool:
    """Whether a device multiplies in a compute dtype."""
    if device.kind == "cpu" and compute in halo.COMPUTE:
        return True
    return RATE_OF.get(compute, compute) in device.peak_flops_per_s


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value is not None and value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise InputError(name.replace("_", "-"), value, "not a choice", f"use one of {choices}")


def smallest_conflict(pins: Pins, possible: Callable[[Pins], bool]) -> tuple[str, ...]:
    """The fewest axes whose pins already leave nothing, others free; empty if no pin is needed.

    Subsets are tried by size, then in the order of the fields, so that the answer is the same each
    time. Call it only when `possible(pins)` is false.
    """
    names = tuple(pins.given())
    for size in range(len(names) + 1):
        for subset in combinations(names, size):
            if not possible(pins.only(subset)):
                return subset
    raise AssertionError("the pins leave something")
