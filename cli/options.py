"""Options that commands share, and how their values become the vocabulary's nouns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

import click

from .. import document, units
from ..choices import (
    ATTENTION_KERNELS,
    COMPUTE_DTYPES,
    KINDS_OF_CP,
    RECIPES,
    RECOMPUTE_MODES,
    RUNTIMES,
    STORAGE_DTYPES,
    TENSORS,
)
from ..cluster import Cluster, Pool
from ..errors import InputError
from ..local_sgd import TECHNIQUE as LOCAL_SGD
from ..model import Model
from ..plan import Plan, PlanFile
from ..schedules import SCHEDULES
from ..workload import Optimizer, Quality, Workload
from .lora import parse_lora
from .offload import parse_offload
from .outer import parse_outer

if TYPE_CHECKING:
    from ..planner import Pins

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(min=1)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
)
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
)
plan_argument = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))


space_option = click.option(
    "--space",
    type=click.Choice(["run", "all"]),
    help="What free axes take: what forerun run executes (default on one node), or all that is "
    "predicted: single tensors to keep, too (default on several).",
)
fit_option = click.option(
    "--fit",
    type=click.Choice(["yes", "marginal"]),
    default="yes",
    show_default=True,
    help="Plans that fit for certain (yes), or by the median of their predicted peak.",
)


def output_option(what: str) -> Callable[[F], F]:
    """The option -o, which writes `what` to a file."""
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), help=f"Write {what} to this file."
    )


def common_options(function: F) -> F:
    """--json and --debug."""
    return json_option(debug_option(function))


JOB_OPTIONS = (
    click.option(
        "--model", help="Catalog name, config.json or its folder, 7b, or package.module:function."
    ),
    click.option(
        "--gpus", help="8xH100, 384x8xA100-80GB, H100:8, 8xH100+8xA100, 2xcpu, or a cluster TOML."
    ),
    click.option(
        "--link-rate",
        metavar="RATE",
        help="Rate of the link between nodes, per device and way: 100Mbit/s, 10Gbit/s, 1.2GB/s.",
    ),
    click.option("--host-memory", metavar="SIZE", help="What offload may fill of a node's host."),
    click.option(
        "--device-memory",
        metavar="SIZE",
        help="Memory of a device instead of its own; on CPUs a budget on live tensors.",
    ),
    click.option("--seq-len", help="Tokens per sequence: 8192, 128k, 1M."),
    click.option(
        "--lengths",
        help="Documents of these lengths are packed into each sequence, attention within a "
        "document: a name of the catalog, a TOML file, or a text file of one length per line.",
    ),
    click.option("--global-batch", help="Sequences per step (64), or tokens (4Mtok, 4Mitok)."),
    click.option("--steps", type=POSITIVE, default=10, show_default=True, help="Optimiser steps."),
    click.option("--data", help="File or folder of text or JSONL; default: Python's own source."),
    click.option(
        "--optimizer",
        type=click.Choice(get_args(Optimizer)),
        help="AdamW with moments in fp32, 8 or 4 bits, 8-bit floats, or on the host; or SGD. "
        "Default: adamw, its moments in fewer bits where --allow lets a search choose.",
    ),
    click.option(
        "--capacity-factor",
        type=click.FloatRange(min=0, min_open=True),
        help="Rows per expert over the mean, the rest dropped; default: the model's.",
    ),
    click.option(
        "--balance-loss",
        type=click.Choice(["none", "micro-batch", "global-batch"]),
        default="none",
        show_default=True,
        help="Load-balancing loss of the routers, over this many tokens.",
    ),
    click.option(
        "--balance-loss-coef",
        type=click.FloatRange(min=0),
        default=0.01,
        show_default=True,
        help="Its weight.",
    ),
    click.option(
        "--router-z-loss-coef",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        help="Weight of the squared log-sum-exp of router logits.",
    ),
    click.option(
        "--clip-norm",
        type=float,
        metavar="NORM",
        help="Scale gradients down to this norm of all of them; default: as they are.",
    ),
    click.option(
        "--objective",
        type=click.Choice(["throughput", "cost", "memory"]),
        default="throughput",
        show_default=True,
        help="What is optimised.",
    ),
)

AXIS_OPTIONS = (
    click.option("--tp", type=POSITIVE, help="Tensor-parallel degree."),
    click.option("--sp/--no-sp", default=None, help="Sequence parallelism beside tp."),
    click.option("--pp", type=POSITIVE, help="Pipeline stages."),
    click.option("--vpp", type=POSITIVE, help="Model chunks per pipeline rank."),
    click.option("--schedule", type=click.Choice(SCHEDULES), help="Pipeline schedule."),
    click.option(
        "--stages",
        metavar="LIST",
        help="Layers of every pipeline stage, in order: 9,8,8,7; even: as even as can be.",
    ),
    click.option("--dp", type=POSITIVE, help="Data-parallel replicas."),
    click.option("--dp-shard", type=POSITIVE, help="Ranks over which a replica group shards."),
    click.option("--zero", type=click.IntRange(0, 3), help="Sharded states: 0 none, 3 all (FSDP)."),
    click.option("--cp", type=POSITIVE, help="Context-parallel degree."),
    click.option(
        "--cp-kind",
        type=click.Choice(KINDS_OF_CP),
        help="How cp cuts the sequence: balanced ring, plain ring, all-to-all, contiguous blocks "
        "whose early ranks help the late ones, or all-to-all inside a balanced ring.",
    ),
    click.option("--ep", type=POSITIVE, help="Expert-parallel degree."),
    click.option(
        "--local-sgd",
        metavar="STEPS",
        type=int,
        help="Replicas (dp over dp-shard) train apart and meet every so many steps.",
    ),
    click.option(
        "--outer",
        metavar="HOW",
        help="How they meet: diloco (default), co2 or average, with settings such as "
        "diloco,fragments=4,delay=2,bits=4.",
    ),
    click.option("--micro-batch", type=POSITIVE, help="Sequences per replica and forward pass."),
    click.option(
        "--recompute",
        type=click.Choice([*RECOMPUTE_MODES, TENSORS, "solve"]),
        help="What is recomputed; solve: chosen layer by layer, as when not given.",
    ),
    click.option(
        "--keep",
        metavar="NAMES",
        help="With --recompute tensors: the tensors of a layer that are kept, such as x1,q,k,v,o.",
    ),
    click.option(
        "--offload",
        metavar="WHAT",
        help="What waits off the device: a fraction of the saved activations (0.5 or "
        "activations=0.5; rest=recompute makes the other tokens again), optimizer, experts or "
        "parameters; tier=host or disk.",
    ),
    click.option(
        "--lora",
        metavar="RANK",
        help="Train adapters of this rank beside frozen weights: 16, or 16,base=nf4 (or gptq4_g128 "
        "and others: see docs/adapters.md) with these in few bits; targets=qv for some linears.",
    ),
    click.option("--attention", type=click.Choice(ATTENTION_KERNELS), help="Attention kernel."),
    click.option(
        "--runtime", type=click.Choice(RUNTIMES), help="Layers one operator at a time, or compiled."
    ),
    click.option("--precision", type=click.Choice(COMPUTE_DTYPES), help="Dtype of the matmuls."),
    click.option(
        "--recipe",
        type=click.Choice(RECIPES),
        help="Scaling of matmuls below 16 bits: torchao's two, or coat, which can store operands.",
    ),
    click.option(
        "--activations",
        type=click.Choice(STORAGE_DTYPES),
        help="Storage of saved activations, where it is not that of the matmuls.",
    ),
)

QUALITY_OPTIONS = (
    click.option(
        "--allow",
        multiple=True,
        metavar="CLASS[,CLASS]",
        help="Quality classes that the planner may use, each with those before it: exact (default),"
        " equivalent-start, measured-here, published, unquantified.",
    ),
    click.option(
        "--accept-risk",
        multiple=True,
        metavar="NAME[,NAME]",
        help="Techniques that it may use whatever their class (see: forerun catalog techniques).",
    ),
)

AXES = (
    "tp",
    "sp",
    "pp",
    "vpp",
    "schedule",
    "stages",
    "dp",
    "dp_shard",
    "zero",
    "cp",
    "cp_kind",
    "ep",
    "micro_batch",
    "recompute",
    "keep",
    "offload",
    "lora",
    "attention",
    "runtime",
    "precision",
    "recipe",
    "activations",
)

NEEDED = {
    "model": "write --model llama-3.1-8b (see: forerun catalog models)",
    "gpus": "write --gpus 8xH100, or --gpus 2xcpu for two processes of this machine",
    "seq_len": "write --seq-len 8192",
    "global_batch": "write --global-batch 64 (sequences) or 4Mtok (tokens)",
}


def job_options(function: F) -> F:
    """The options that fix model, cluster and workload."""
    for option in reversed(JOB_OPTIONS):
        function = option(function)
    return function


def axis_options(function: F) -> F:
    """One option per axis of the layout."""
    for option in reversed(AXIS_OPTIONS):
        function = option(function)
    return function


def quality_options(function: F) -> F:
    """What the planner may use beside exact techniques."""
    for option in reversed(QUALITY_OPTIONS):
        function = option(function)
    return function


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


def read_plan_file(path: Path) -> PlanFile:
    """The plan file at `path`, checked against itself."""
    plan_file = document.read(PlanFile, path)
    plan_file.plan.check()
    return plan_file


def say(line: str) -> None:
    """Print a line of the log to stderr."""
    click.echo(line, err=True)


def say_job(job: Job) -> None:
    """Print notes and warnings of a job to stderr."""
    for note in job.notes:
        say(f"note: {note}")
    for warning in job.warnings:
        say(f"warning: {warning}")


def say_not_executed(plan: Plan) -> None:
    """Say what `forerun run` would refuse in a plan, so that nobody finds out on the cluster."""
    from ..executors.support import check_executed

    try:
        check_executed(plan)
    except InputError as error:
        say(f"note: forerun run does not execute this plan yet: {error}")


def plan_file_of(plan: Plan) -> PlanFile:
    """The plan priced by the cost model, as the file that `run` and `diff` read."""
    from ..costmodel import estimate

    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))
