"""Boxes in and out of torch's distributed checkpoint.

Torch asks a planner what a rank writes and reads; these answer with boxes of global tensors. Boxes
that several ranks hold are written by one of them (torch shares them out), and torch checks that
all boxes of a tensor cover it once.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...errors import InputError
from .shards import APART, OUTER, Shard

State = dict[str, Shard]
BOXES = "boxes"
"""The one key under which a state is handed to torch, which spends time on every key."""


def chunk(shard: Shard) -> ChunkStorageMetadata:
    """The box in torch's words."""
    return ChunkStorageMetadata(offsets=torch.Size(shard.offsets), sizes=shard.tensor.shape)


class BoxSavePlanner(DefaultSavePlanner):
    """Writes the boxes of a state; empty ones are left out."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item per box."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, torch.Size(shard.offsets)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=chunk(shard),
                        properties=TensorProperties.create_from_tensor(shard.tensor),
                        size=torch.Size(shard.shape),
                    ),
                )
                for name, shard in self.state_dict[BOXES].items()
                if shard.tensor.numel()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of a box."""
        return self.state_dict[BOXES][index.fqn].tensor


class BoxLoadPlanner(LoadPlanner):
    """Reads into the boxes of a state, in place."""

    state: State
    metadata: Metadata

    def __init__(self, source: str) -> None:
        self.source = source
        """What an error calls the checkpoint."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Remember where to read to."""
        assert metadata is not None
        self.state, self.metadata = state_dict[BOXES], metadata

    def create_local_plan(self) -> LoadPlan:
        """Every part of a saved box that a local one overlaps."""
        items: list[ReadItem] = []
        for name, shard in self.state.items():
            if not shard.tensor.numel():
                continue
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise _absent(self.source, name)
            if tuple(saved.size) != shard.shape:
                raise InputError("resume", self.source,
                                 f"holds {name} as {list(saved.size)}, not {list(shard.shape)}",
                                 "give a checkpoint of this model")  # fmt: skip
            items += create_read_items_for_chunk_list(name, saved, [chunk(shard)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads its own."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Checkpoints hold tensors alone."""
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the local tensor that an item is read into."""
        part = self.state[read_item.dest_index.fqn].tensor
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Torch has copied into the part already."""


def save_alone(state: State, path: Path) -> None:
    """Write a state from this process alone."""
    with _alone():
        state_dict_saver.save(
            {BOXES: state},
            storage_writer=FileSystemWriter(path, overwrite=False),
            planner=BoxSavePlanner(),
            no_dist=True,
        )


def load_alone(state: State, path: Path) -> None:
    """Read a state for this process alone, in place."""
    with _alone():
        state_dict_loader.load(
            {BOXES: state},
            storage_reader=PlainReader(path),
            planner=BoxLoadPlanner(str(path)),
            no_dist=True,
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns that other processes are not asked, which is what is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _absent(source: str, name: str) -> InputError:
    if "[" in name:
        return InputError("resume", source, f"holds {name.partition('[')[0]} in other pieces",
                          "resume in the layout that wrote it: quantised optimiser states "
                          "keep it")  # fmt: skip
    if APART in name or name.startswith(OUTER):
        return InputError("resume", source, f"holds no {name}", "resume with the replicas and the "
                          "--local-sgd that wrote it: what they keep apart is its own")  # fmt: skip
    return InputError("resume", source, f"holds no {name}", "give a checkpoint of this model, "
                      "written by replicas that do not train apart")  # fmt: skip


ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata",
        "BytesStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip
"""The plain values that torch's metadata consists of, dtypes apart."""


class PlainReader(FileSystemReader):
    """Reads a checkpoint without running what is in it: its metadata may hold plain values alone.

    Torch keeps that as a pickle, which could name any function.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Torch's metadata, by names that are allowed."""
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and global_name in DTYPES
        if global_name not in ALLOWED.get(module_name, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")
        return super().find_class(module_name, global_name)


DTYPES = frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
