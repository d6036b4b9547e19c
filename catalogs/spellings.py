"""What people write for `--model` and `--gpus`, as a Model and a Cluster."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from ..cluster import Cluster, Device, Pool, Profile
from ..document import from_raw, read, read_raw
from ..errors import InputError
from ..model import Model
from . import huggingface, sizes
from .loader import Hardware, load_catalog_model, load_hardware, load_stack, resolve_name
from .machine import usable_cores
from .profiles import load_profile, load_user_profile

_NODES = re.compile(r"([+-]?\d+)\s*[x*]\s*([+-]?\d+)\s*[x*]\s*([a-z0-9].*)", re.IGNORECASE)
_COUNT = re.compile(r"([+-]?\d+)\s*[x*]\s*([a-z0-9].*)", re.IGNORECASE)
_COLON = re.compile(r"([a-z0-9][^:]*):([+-]?\d+)", re.IGNORECASE)
_MAX_DEVICES = 1_000_000
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Resolved(NamedTuple):
    """A cluster, and in words what was decided where the spelling left it open."""

    cluster: Cluster
    notes: tuple[str, ...]


class _Asked(NamedTuple):
    """A spelling taken apart: devices, or nodes of devices."""

    name: str
    devices: int
    nodes: int | None


def load_model(spec: str) -> Model:
    """The model that a spelling means.

    A catalog name or alias in any letter case, a parameter count (`7b`), a Hugging Face
    `config.json` or a folder that holds one, or a model document of ours in TOML or JSON.
    """
    spec = spec.strip()
    if not spec:
        raise InputError("model", "(empty)", "no model", "give a catalog name, a path or a size")
    if resolve_name("models", spec) is not None:
        return load_catalog_model(spec)
    if sizes.parse_count(spec) is not None:
        return sizes.standard_decoder(spec)
    if Path(spec).exists() or _looks_like_path(spec):
        return _model_from_path(Path(spec).expanduser())
    if _FUNCTION.fullmatch(spec):
        raise InputError("model", spec, "tracing a module is not available yet",
                         "give a catalog name, a config.json or a size such as 7b")  # fmt: skip
    return load_catalog_model(spec)


def _looks_like_path(spec: str) -> bool:
    return spec.endswith((".json", ".toml")) or os.sep in spec


def _model_from_path(path: Path) -> Model:
    known = resolve_name("models", path.name)
    if known is not None and not path.exists():
        raise InputError("model", path, "no such file", f"{known} is in the catalog")
    if path.is_dir():
        path = path / "config.json"
    raw = read_raw(path)
    if isinstance(raw, dict) and "schema" not in raw and path.suffix != ".toml":
        fields = cast("dict[str, Any]", raw)
        return huggingface.model_from_config(fields, source=str(path))
    return from_raw(Model, raw, str(path))


def load_cluster(spec: str, *, stack: str | None = None, profile: Profile | None = None) -> Cluster:
    """The cluster that a `--gpus` spelling means; see `resolve_gpus`."""
    return resolve_gpus(spec, stack=stack, profile=profile).cluster


def resolve_gpus(
    spec: str, *, stack: str | None = None, profile: Profile | None = None
) -> Resolved:
    """The cluster that a spelling means, with what was decided on the way.

    `8xH100`, `384x8xA100-80GB` (nodes x devices per node), `H100:8`, `2xcpu` (two processes of this
    machine), `2x8xH100+4x8xA100` (two pools, joined by the slower of their networks), in any letter
    case, or the path of a cluster document. `stack` names another software stack than the
    catalog's; `profile` takes the place of the user's stored one.

    >>> resolve_gpus("16xh100").cluster.pools[0].num_nodes
    2
    """
    spec = spec.strip()
    if spec.lower().endswith((".toml", ".json")) or os.sep in spec:
        return _from_document(spec, stack, profile)
    if "+" in spec.lstrip("+"):
        return _several(spec, stack, profile)
    asked = _take_apart(spec)
    if not 1 <= asked.devices <= _MAX_DEVICES:
        raise InputError("gpus", spec, f"{asked.devices} devices", f"give 1 to {_MAX_DEVICES}")
    hardware = load_hardware(asked.name)
    notes = _name_notes(asked, hardware)
    if hardware.device.kind == "cpu":
        pool = _cpu_pool(hardware, asked, spec, stack)
    else:
        num_nodes, per_node, more = _shape(hardware, asked, spec)
        notes += more
        pool = _pool(hardware, hardware.device, num_nodes, per_node, stack)
    profile, more = _profile_for((pool,), profile)
    return Resolved(Cluster(name=spec, pools=(pool,), profile=profile), (*notes, *more))


def _several(spec: str, stack: str | None, profile: Profile | None) -> Resolved:
    """The pools of a spelling with `+` between them; of one kind twice the second has a number."""
    pools: list[Pool] = []
    notes: list[str] = []
    for part in spec.split("+"):
        found = resolve_gpus(part, stack=stack)
        (pool,) = found.cluster.pools
        if pool.device.kind == "cpu":
            raise InputError("gpus", spec, "CPU processes are a cluster of their own",
                             "join pools of GPUs only")  # fmt: skip
        alike = sum(other.device.name == pool.device.name for other in pools)
        name = f"{pool.name}-{alike + 1}" if alike else pool.name
        pools.append(msgspec.structs.replace(pool, name=name))
        notes += [note for note in found.notes if note not in notes]
    used, more = _profile_for(tuple(pools), profile)
    notes += [note for note in more if note not in notes]
    return Resolved(Cluster(name=spec, pools=tuple(pools), profile=used), tuple(notes))


def _take_apart(spec: str) -> _Asked:
    if match := _NODES.fullmatch(spec):
        nodes, per_node, name = int(match[1]), int(match[2]), match[3]
        for what, number in (("nodes", nodes), ("GPUs per node", per_node)):
            if number < 1:
                raise InputError("gpus", spec, f"{number} {what}", "give 1 or more")
        return _Asked(name, nodes * per_node, nodes)
    if match := _COUNT.fullmatch(spec):
        name, devices = match[2], int(match[1])
    elif match := _COLON.fullmatch(spec):
        name, devices = match[1], int(match[2])
    elif resolve_name("hardware", spec) is not None:
        name, devices = spec, 1
    else:
        raise InputError("gpus", spec or "(empty)", "not a number of devices",
                         "write 8xH100, 384x8xA100-80GB, 8xH100+8xA100 or 2xcpu")  # fmt: skip
    return _Asked(name, devices, None)


def _name_notes(asked: _Asked, hardware: Hardware) -> tuple[str, ...]:
    if asked.name.strip().lower() == hardware.name.lower():
        return ()
    return (f"{asked.name.strip()} -> {hardware.name}",)


def _shape(hardware: Hardware, asked: _Asked, spec: str) -> tuple[int, int, tuple[str, ...]]:
    """Nodes and devices per node; where a link joins hosts (NVL72) a node is one such domain."""
    domain = hardware.devices_per_domain
    if asked.nodes is not None and hardware.domain_devices is None:
        per_node = asked.devices // asked.nodes
        if per_node > domain:
            raise InputError("gpus", spec, f"a {hardware.name} node has {domain} devices",
                             f"write {asked.devices}x{asked.name} or fewer per node")  # fmt: skip
        return asked.nodes, per_node, ()
    if asked.devices <= domain:
        return 1, asked.devices, ()
    if hardware.domain_devices is not None:
        return _domains(hardware, asked.devices, spec)
    if asked.devices % domain:
        lower = asked.devices // domain * domain
        problem = f"{asked.devices} devices do not fill nodes of {domain}"
        remedy = f"use {lower} or {lower + domain}, or write NODESxDEVICESx{asked.name}"
        raise InputError("gpus", spec, problem, remedy)
    num_nodes = asked.devices // domain
    return num_nodes, domain, (f"{asked.devices} devices -> {num_nodes} nodes of {domain}",)


def _domains(hardware: Hardware, devices: int, spec: str) -> tuple[int, int, tuple[str, ...]]:
    """Equal domains, as full as whole hosts allow: 256 of NVL72 are 4 domains with 64 in use."""
    step = hardware.devices_per_node
    for per_domain in range(hardware.devices_per_domain, 0, -step):
        if devices % per_domain == 0:
            count = devices // per_domain
            note = f"{devices} devices -> {count} NVLink domains with {per_domain} in use each"
            return count, per_domain, (note,)
    raise InputError("gpus", spec, f"{devices} devices do not fill hosts of {step}",
                     f"give a multiple of {step}")  # fmt: skip


def _pool(
    hardware: Hardware, device: Device, num_nodes: int, per_node: int, stack: str | None
) -> Pool:
    return Pool(
        name=hardware.name,
        device=device,
        devices_per_node=per_node,
        num_nodes=num_nodes,
        intra_node=hardware.intra_node,
        inter_node=hardware.inter_node,
        host=hardware.host,
        host_memory_bytes=hardware.host_memory_bytes,
        disk=hardware.disk,
        shared_cores=usable_cores() if device.kind == "cpu" else None,
        stack=load_stack(stack or hardware.stack, hardware.family),
        price_usd_per_hour=hardware.price_usd_per_hour,
    )


def _cpu_pool(hardware: Hardware, asked: _Asked, spec: str, stack: str | None) -> Pool:
    """This machine's processes: they share its cores, and its memory in equal parts.

    `2x1xcpu` are nodes of processes on this machine, joined by links that a run can emulate.
    """
    num_nodes = asked.nodes or 1
    device = msgspec.structs.replace(
        hardware.device, memory_bytes=hardware.device.memory_bytes // asked.devices
    )
    pool = _pool(hardware, device, num_nodes, asked.devices // num_nodes, stack)
    return msgspec.structs.replace(pool, on_one_machine=num_nodes > 1)


def _profile_for(
    pools: tuple[Pool, ...], given: Profile | None
) -> tuple[Profile | None, tuple[str, ...]]:
    """The profile to price with: the given one, or the user's of the first device that has one; the
    catalog's for one node, which it was measured on a part of."""
    devices = [pool.device.name for pool in pools]
    if given is not None:
        if given.device not in devices:
            raise InputError("profile", given.name,
                             f"was measured on {given.device}, not {' or '.join(devices)}",
                             "give a profile of this device")  # fmt: skip
        return given, ()
    one_node = sum(pool.num_devices for pool in pools) <= pools[0].devices_per_node
    for device in devices:
        found = load_profile(device) if one_node else load_user_profile(device)
        if found is not None:
            return found, (f"profile {found.name} of {found.date}",)
    return None, ()


def _from_document(spec: str, stack: str | None, profile: Profile | None) -> Resolved:
    cluster = read(Cluster, Path(spec).expanduser())
    pools = cluster.pools
    if stack is not None:
        pools = tuple(
            msgspec.structs.replace(pool, stack=load_stack(stack, _family(pool.device.name)))
            for pool in pools
        )
    found, notes = _profile_for(pools, profile or cluster.profile)
    return Resolved(msgspec.structs.replace(cluster, pools=pools, profile=found), notes)


def _family(device: str) -> str | None:
    """The stack family of a catalog device; None for a device of the user's own."""
    found = resolve_name("hardware", device)
    return None if found is None else load_hardware(found).family
