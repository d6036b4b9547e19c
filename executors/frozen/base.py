"""The weights that adapters train beside: a checkpoint of a training, or quantised weights.

Both are checkpoints in form (`checkpoints/folder.py`): global tensors by name. Quantised ones hold,
in the place of a linear's weight, its codes, scales and zeros.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ...errors import InputError
from ...plan import Plan
from ..checkpoints.folder import newest_base
from ..checkpoints.planners import PlainReader, load_alone
from ..checkpoints.shards import PARAMETER, Shard
from .stored import NF4, Stored


class Base:
    """Reads single tensors of a checkpoint; every rank for itself."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata

    @staticmethod
    def of(place: Path, plan: Plan) -> Base:
        """The newest checkpoint in a folder (`folder.check_base`)."""
        path = newest_base(place, plan.model)
        return Base(path, PlainReader(path).read_metadata())

    def has(self, name: str) -> bool:
        """Whether there is a parameter of that name."""
        return f"{PARAMETER}.{name}" in self.metadata.state_dict_metadata

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter."""
        if not self.has(name):
            stored = name.replace(".weight", ".stored.codes")
            what = "is quantised there" if self.has(stored) else "is not there"
            raise InputError("base", self.path, f"{name} {what}", "give a checkpoint of weights as "
                             "they come, or a plan with the storage that they have")  # fmt: skip
        return self._read(name, shape)

    def stored(self, path: str, module: Stored) -> dict[str, Tensor] | None:
        """The bytes of this rank's part of a stored matrix; None where they are to be made from
        the matrix itself."""
        names = {part: f"{path}.{part}" for part, _ in module.named_parameters()}
        if module.base == NF4:
            return None
        if not self.has(names["codes"]):
            raise InputError("base", self.path, f"holds no codes of {path.removesuffix('.stored')}",
                             "quantise it with forerun quantize, or use base nf4")  # fmt: skip
        shapes = module.whole_shapes()
        return module.part_of({p: self._read(name, shapes[p]) for p, name in names.items()})

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        key = f"{PARAMETER}.{name}"
        saved = self.metadata.state_dict_metadata[key]
        assert isinstance(saved, TensorStorageMetadata)
        if tuple(saved.size) != shape:
            raise InputError("base", self.path, f"holds {name} as {list(saved.size)}, not "
                             f"{list(shape)}", "quantise it as this plan stores it")  # fmt: skip
        whole = torch.empty(shape, dtype=saved.properties.dtype)
        shard = Shard(tensor=whole, shape=shape, offsets=(0,) * len(shape))
        try:
            load_alone({key: shard}, self.path)
        except CheckpointException as error:
            raise InputError("base", self.path, f"{name} cannot be read", "give another") from error
        return whole
