"""The loader of the catalogs: one TOML document per entry, found by name in any letter case.

A name is looked up among the file names of its folder, then among the aliases of the folder in
`aliases.toml`; one document is read and validated. `entries` alone reads a whole folder.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import msgspec

from ..cluster import Device, Link
from ..document import Document, Value, from_raw, read, read_bytes, read_raw, to_raw
from ..errors import InputError, unknown_name
from ..lengths import Lengths
from ..model import Model
from ..stack import Stack
from ..workload import Quality, Workload
from .machine import usable_memory_bytes

ROOT = Path(__file__).parent
MOST_TOKENS = 2**40
"""Of one sequence."""


class Hardware(Document, frozen=True, kw_only=True):
    """One node type: a device, how many share a node, and the links of each device."""

    SCHEMA: ClassVar[str] = "forerun.hardware/1"

    schema: str = "forerun.hardware/1"
    name: str
    family: str
    """Which stack constants fit: the stack `S` of this family is the document `S-FAMILY`."""
    device: Device
    devices_per_node: int
    domain_devices: int | None = None
    """Devices joined by `intra_node` where that link spans nodes (NVL72); None = one node."""
    intra_node: Link
    inter_node: Link | None = None
    host: Link | None = None
    host_memory_bytes: int | None = None
    """Of a node, what offload may fill; None = not limited here."""
    disk: Link | None = None
    stack: str = "pytorch-fsdp"
    price_usd_per_hour: float | None = None
    source: str

    @property
    def devices_per_domain(self) -> int:
        """Devices that reach each other over `intra_node`."""
        return self.domain_devices or self.devices_per_node


class Technique(Document, frozen=True, kw_only=True):
    """The evidence for one technique: what is claimed, by whom, and under which conditions."""

    SCHEMA: ClassVar[str] = "forerun.technique/1"

    schema: str = "forerun.technique/1"
    name: str
    title: str
    paper: str
    claim: str
    conditions: str
    domain: str
    """Kinds of models that it is meant for."""
    exactness: Quality
    """The weakest class of its settings."""
    settings: dict[str, str]
    """Each setting and what it does to the numbers."""
    requirements: tuple[str, ...] = ()
    validated_params: float | None = None
    """Parameters of the largest model that the claim was tested on; None = it does not depend."""
    recalled: bool = False
    """Whether paper and claim are from memory, not read again."""


class WorkloadEntry(Value, frozen=True, kw_only=True):
    """A workload with a name and where it comes from."""

    name: str
    model: str
    """The catalog model that it was published with."""
    workload: Workload
    source: str


KINDS: dict[str, type[Value]] = {
    "hardware": Hardware,
    "models": Model,
    "stacks": Stack,
    "techniques": Technique,
    "lengths": Lengths,
    "workloads": WorkloadEntry,
}

V = TypeVar("V", bound=Value)


def fold(name: str) -> str:
    """A name without letter case; `_` and blanks count as `-`.

    >>> fold("Llama_3.1 8B")
    'llama-3.1-8b'
    """
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise unknown_name("catalog", kind, KINDS)


@functools.cache
def _stems(kind: str) -> dict[str, str]:
    files = (file for file in os.listdir(ROOT / kind) if file.endswith(".toml"))
    return {fold(stem): stem for stem in sorted(file.removesuffix(".toml") for file in files)}


@functools.cache
def _aliases(kind: str) -> dict[str, str]:
    raw = cast("dict[str, dict[str, str]]", read_raw(ROOT / "aliases.toml"))
    return {fold(alias): name for alias, name in raw.get(kind, {}).items()}


def names(kind: str) -> tuple[str, ...]:
    """The names of a catalog, sorted; no document is read."""
    _check_kind(kind)
    return tuple(sorted(_stems(kind).values(), key=str.lower))


def resolve_name(kind: str, name: str) -> str | None:
    """The catalog's own spelling of a name or alias; None when it is not known."""
    _check_kind(kind)
    folded = fold(name)
    found = _stems(kind).get(folded)
    return found or _aliases(kind).get(folded)


def suggest(kind: str, field: str, name: str) -> InputError:
    """The error for an unknown name, with near names and aliases."""
    return unknown_name(field, name, {*_stems(kind).values(), *_aliases(kind)})


def _load(kind: str, expected: type[V], field: str, name: str) -> V:
    found = resolve_name(kind, name)
    if found is None:
        raise suggest(kind, field, name)
    return read(expected, ROOT / kind / f"{found}.toml")


def load_hardware(name: str) -> Hardware:
    """The node type of that name or alias; `cpu` has the memory of this machine."""
    return _on_this_machine(_load("hardware", Hardware, "gpus", name))


def _on_this_machine(hardware: Hardware) -> Hardware:
    if hardware.device.kind != "cpu":
        return hardware
    device = msgspec.structs.replace(hardware.device, memory_bytes=usable_memory_bytes())
    return msgspec.structs.replace(hardware, device=device)


def load_catalog_model(name: str) -> Model:
    """The catalog's model of that name or alias."""
    return _load("models", Model, "model", name)


def load_stack(name: str, family: str | None = None) -> Stack:
    """The software stack of that name: the document of the device family if there is one."""
    name = resolve_name("stacks", name) or name
    if family is not None and resolve_name("stacks", f"{name}-{family}") is not None:
        name = f"{name}-{family}"
    return _load("stacks", Stack, "stack", name)


def load_technique(name: str, field: str = "technique") -> Technique:
    """The evidence record of that name or alias; an error names `field`."""
    return _load("techniques", Technique, field, name)


def load_lengths(name: str) -> Lengths:
    """The distribution of lengths of that name: of the catalog, in a TOML or JSON file, or of the
    numbers in a text file, one length in tokens per line."""
    if resolve_name("lengths", name) is not None:
        return _load("lengths", Lengths, "lengths", name)
    path = Path(name)
    if not path.suffix and not path.exists():
        raise suggest("lengths", "lengths", name)
    if path.suffix in (".toml", ".json"):
        return read(Lengths, path)
    return Lengths.of(path.stem, read_lengths(path), str(path))


def read_lengths(path: str | Path) -> tuple[int, ...]:
    """One length in tokens per line; empty lines are left out.

    Raises InputError that names the line of what is not a positive whole number.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("file", path, "not a text file", "give one length per line") from error
    numbers: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit()) or not 0 < int(word[:20]) <= MOST_TOKENS:
            raise InputError(f"line {number} of {path}", word[:40], "not a positive whole number",
                             "give one length in tokens per line")  # fmt: skip
        numbers.append(int(word))
    if not numbers:
        raise InputError("file", path, "no lengths", "give one length in tokens per line")
    return tuple(numbers)


def _as_entry(kind: str, name: str) -> dict[str, Any]:
    path = ROOT / kind / f"{name}.toml"
    value = from_raw(KINDS[kind], read_raw(path), str(path))
    if isinstance(value, Hardware):
        value = _on_this_machine(value)
    raw = cast("dict[str, Any]", to_raw(value))
    if isinstance(value, Model):
        raw["num_params"] = value.num_params
    return raw


def entries(kind: str) -> list[dict[str, Any]]:
    """Every document of a catalog as plain values, in the order of the names."""
    return [_as_entry(kind, name) for name in names(kind)]


def entry(kind: str, name: str) -> dict[str, Any]:
    """One document of a catalog as plain values (models with their parameter count)."""
    found = resolve_name(kind, name)
    if found is None:
        raise suggest(kind, "name", name)
    return _as_entry(kind, found)
