"""What the user asks for, read: model, cluster, workload, and what may be done to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .. import units
from ..cluster import Cluster, Pool
from ..errors import InputError
from ..local_sgd import TECHNIQUE as LOCAL_SGD
from ..model import Model
from ..workload import Quality, Workload
from .lora import parse_lora
from .outer import parse_outer

NEEDED = {
    "model": "write --model llama-3.1-8b (see: forerun catalog models)",
    "gpus": "write --gpus 8xH100, or --gpus 2xcpu for two processes of this machine",
    "seq_len": "write --seq-len 8192",
    "global_batch": "write --global-batch 64 (sequences) or 4Mtok (tokens)",
}


class Job(NamedTuple):
    """What the user fixed, and what was decided in reading it."""

    model: Model
    cluster: Cluster
    workload: Workload
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read_job(flags: Mapping[str, Any]) -> Job:
    """Model, cluster and workload from the values of `JOB_OPTIONS`."""
    for field, remedy in NEEDED.items():
        if flags[field] is None:
            raise InputError(field.replace("_", "-"), "(missing)", "not given", remedy)
    from ..catalogs import load_evidence, load_lengths, load_model, resolve_gpus
    from ..evidence import for_job

    seq_tokens = units.parse_tokens(flags["seq_len"])
    batch_seqs = units.parse_batch(flags["global_batch"], seq_tokens)
    model = (
        trace_model(flags, seq_tokens) if is_traced(flags["model"]) else load_model(flags["model"])
    )
    if flags.get("capacity_factor") is not None:
        model = with_capacity(model, flags["capacity_factor"])
    resolved = resolve_gpus(flags["gpus"])
    quality, accepted = read_quality(flags)
    evidence = for_job(load_evidence(), model, resolved.cluster)
    workload = Workload(
        seq_tokens=seq_tokens,
        lengths=load_lengths(flags["lengths"]) if flags.get("lengths") else None,
        global_batch_seqs=batch_seqs,
        steps=flags["steps"],
        data=flags["data"],
        optimizer=flags["optimizer"] or "adamw",
        clip_norm=flags.get("clip_norm"),
        objective=flags["objective"],
        balance_loss=flags.get("balance_loss", "none"),
        balance_loss_coef=flags.get("balance_loss_coef", 0.01),
        router_z_loss_coef=flags.get("router_z_loss_coef", 0.0),
        quality=quality,
        accepted=accepted,
        evidence=evidence,
    )
    cluster = with_budgets(resolved.cluster, flags)
    return Job(model, cluster, workload, resolved.notes, job_warnings(model, workload))


def with_budgets(cluster: Cluster, flags: Mapping[str, Any]) -> Cluster:
    """The cluster with the memory and links that --device-memory, --host-memory and --link-rate
    give it."""
    import msgspec

    pools = cluster.pools
    if flags.get("link_rate"):
        pools = tuple(_with_rate(pool, flags["link_rate"]) for pool in pools)
    if flags.get("host_memory"):
        budget = units.parse_bytes("host-memory", flags["host_memory"])
        pools = tuple(msgspec.structs.replace(p, host_memory_bytes=budget) for p in pools)
    if flags.get("device_memory"):
        budget = units.parse_bytes("device-memory", flags["device_memory"])
        pools = tuple(
            msgspec.structs.replace(
                pool,
                device=msgspec.structs.replace(
                    pool.device, memory_bytes=budget, tensors_only=pool.device.kind == "cpu"
                ),
            )
            for pool in pools
        )
    return msgspec.structs.replace(cluster, pools=pools)


def _with_rate(pool: Pool, text: str) -> Pool:
    """The pool with that rate between nodes."""
    import msgspec

    rate = units.parse_rate("link-rate", text)
    if pool.num_nodes == 1:
        raise InputError("link-rate", text, f"{pool.name} is one node, without links between",
                         "give several: 2x8xH100, or 2x1xcpu on this machine")  # fmt: skip
    link = pool.inter_node or pool.intra_node
    source = "--link-rate"
    return msgspec.structs.replace(
        pool, inter_node=msgspec.structs.replace(link, bytes_per_s=rate, source=source)
    )


def with_capacity(model: Model, factor: float) -> Model:
    """The model with a capacity factor for the experts of all layers."""
    import msgspec

    replace = msgspec.structs.replace
    if all(layer.experts is None for layer in model.layers):
        raise InputError("capacity-factor", factor, f"{model.name} has no routed experts",
                         "drop --capacity-factor")  # fmt: skip
    layers = tuple(
        layer
        if layer.experts is None
        else replace(layer, experts=replace(layer.experts, capacity_factor=factor))
        for layer in model.layers
    )
    return replace(model, layers=layers)


def read_quality(flags: Mapping[str, Any]) -> tuple[tuple[Quality, ...], tuple[str, ...]]:
    """Allowed classes, and techniques that are accepted: by name, or by being asked for."""
    about_quality = ("allow", "accept_risk", "precision", "activations", "local_sgd", "lora")
    if not any(flags.get(name) for name in about_quality):
        if flags["optimizer"] in (None, "adamw"):
            return ("exact",), ()
    from ..planner.quality import accepted_names, classes_up_to, record_names

    precision = {"compute": flags.get("precision"), "activations": flags.get("activations")}
    given = {name: value for name, value in precision.items() if value is not None}
    techniques = {"precision": given}
    local = parse_outer(flags.get("local_sgd"), flags.get("outer"))
    if local is not None:
        techniques[LOCAL_SGD] = local.settings()
    pins = parse_lora(flags.get("lora"))
    if pins:
        techniques["lora"] = {"rank": pins["lora"], "base": pins.get("lora_base", "")}
    asked = record_names(techniques, flags["optimizer"] or "adamw")
    named = _split(flags.get("accept_risk") or ())
    return classes_up_to(_split(flags.get("allow") or ())), accepted_names([*named, *asked])


def _split(values: Iterable[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def is_traced(name: str | None) -> bool:
    """Whether a model's name is `package.module:function`, or `hf:PATH`.

    >>> is_traced("examples.mixer:build"), is_traced("hf:llama/config.json")
    (True, True)
    >>> is_traced("llama-3.1-8b"), is_traced("C:/config.json")
    (False, False)
    """
    return re.fullmatch(r"[\w.]+:[\w.]+|hf:.+", name or "") is not None


def trace_model(flags: Mapping[str, Any], seq_tokens: int) -> Model:
    """The user's module as a Model; what its plans do not name cannot divide it."""
    for axis in ("sp", "cp", "ep"):
        if (flags.get(axis) or 1) > 1 or (axis == "sp" and flags.get(axis)):
            raise InputError(axis, flags[axis], "does not divide a module of one's own",
                             f"drop --{axis}")  # fmt: skip
    if flags.get("recompute") not in (None, "none", "full"):
        raise InputError("recompute", flags["recompute"], "a module of one's own recomputes "
                         "whole blocks", "use none or full")  # fmt: skip
    try:
        from ..executors.trace_module import trace
    except ModuleNotFoundError as error:
        raise InputError("model", flags["model"], f"tracing needs {error.name}",
                         "pip install 'forerun[run]'") from error  # fmt: skip
    model = trace(flags["model"], seq_tokens)
    assert model.traced is not None
    for axis, plan in (("tp", model.traced.divided), ("pp", model.traced.hidden)):
        if (flags.get(axis) or 1) > 1 and not plan:
            problem = f"{flags['model']} has no {axis}_plan that it can be divided by"
            raise InputError(axis, flags[axis], problem,
                             f"give it one (docs/modules.md), or drop --{axis}")  # fmt: skip
    return model


def job_warnings(model: Model, workload: Workload) -> tuple[str, ...]:
    """What is allowed but probably not meant."""
    limit = model.max_positions
    if limit is not None and model.text_tokens(workload.seq_tokens) > limit:
        return (
            f"seq-len={workload.seq_tokens}: beyond the {limit} positions of {model.name}; "
            "the plan holds, but it has learned none so far",
        )
    return ()
