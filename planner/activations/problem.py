"""The nouns of the problem: saved tensors, the operators that can make them again, limits.

A layer's forward is a list of operators. Some of the tensors that they make are needed by its
backward; between the two passes each of these either lies on the device, wholly or compressed,
or on the host, or is made again from others.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One tensor of a layer, of one micro-batch."""

    name: str
    bytes: float
    needed: bool = True
    """Whether backward reads it; another one is stored only where others are made from it."""
    compressed_bytes: float | None = None
    """Bytes in the compressed form, scales included; None where it has none."""
    compress_s: float = 0.0
    decompress_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """An operator of the forward pass: run again, it makes all its outputs again."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float
    """To run it again, for one micro-batch."""
    repeatable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerType:
    """Equal layers of a stage.

    `makers` stand in forward order, so that the inputs of one are made by earlier ones or by none;
    tensors made by none come from outside of the layer.
    """

    name: str
    count: int
    tensors: tuple[SavedTensor, ...]
    makers: tuple[Maker, ...]
    forward_s: float
    """What copies to the host can hide behind while one layer runs its forward."""
    backward_s: float
    """The same for copies back, during one backward without recomputation."""

    def __post_init__(self) -> None:
        _at_least("layers", self.count, 1)
        for field in ("forward_s", "backward_s"):
            _at_least(field, getattr(self, field), 0)
        known = {tensor.name for tensor in self.tensors}
        if len(known) < len(self.tensors):
            raise InputError("tensors", self.name, "two tensors have one name", "rename one")
        for tensor in self.tensors:
            _at_least(f"{tensor.name}.bytes", tensor.bytes, 0)
            _at_least(f"{tensor.name}.compress_s", tensor.compress_s, 0)
            _at_least(f"{tensor.name}.decompress_s", tensor.decompress_s, 0)
            if tensor.compressed_bytes is not None:
                _at_least(f"{tensor.name}.compressed_bytes", tensor.compressed_bytes, 0)
        _check_makers(self.makers, known)

    @property
    def needed_bytes(self) -> float:
        """What one layer keeps of one micro-batch when everything needed is kept."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a stage has for its saved tensors.

    Infinite bytes are no limit; a copy rate of zero, or no host bytes, turns offload off.
    """

    device_bytes: float
    host_bytes: float = float("inf")
    live_micro_batches: int = 1
    """Micro-batches between their forward and their backward at once."""
    copy_bytes_per_s: float = 0.0
    """To the host, and as much back at the same time."""
    compress: bool = False

    def __post_init__(self) -> None:
        _at_least("memory-limit", self.device_bytes, 0)
        _at_least("host-limit", self.host_bytes, 0)
        _at_least("live-micro-batches", self.live_micro_batches, 1)
        _at_least("copy-bandwidth", self.copy_bytes_per_s, 0)

    @property
    def offload(self) -> bool:
        """Whether tensors can go to the host."""
        return self.copy_bytes_per_s > 0 and self.host_bytes > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The layers of a stage and the limits that they share."""

    layers: tuple[LayerType, ...]
    limits: Limits

    @property
    def keep_all_bytes(self) -> float:
        """Device bytes of all live micro-batches when everything needed is kept."""
        live = self.limits.live_micro_batches
        return live * sum(layer.count * layer.needed_bytes for layer in self.layers)


def _at_least(field: str, value: float, least: float) -> None:
    if not value >= least:  # also refuses NaN
        raise InputError(field, value, f"less than {least}", f"give {least} or more")


def _check_makers(makers: tuple[Maker, ...], known: set[str]) -> None:
    """Every tensor is known and made once, and before it is read."""
    made_at: dict[str, int] = {}
    for index, maker in enumerate(makers):
        _at_least(f"{maker.name}.recompute_s", maker.seconds, 0)
        for name in (*maker.inputs, *maker.outputs):
            if name not in known:
                raise InputError("needs", name, f"{maker.name} names a tensor that is not there",
                                 "add the tensor or correct the name")  # fmt: skip
        for name in maker.outputs:
            if name in made_at:
                raise InputError("id", name, "made twice", "give every tensor one maker")
            made_at[name] = index
    for index, maker in enumerate(makers):
        for name in maker.inputs:
            if made_at.get(name, -1) >= index:
                raise InputError("needs", name, f"{maker.name} reads it before it is made",
                                 "list tensors in the order in which they are made")  # fmt: skip
