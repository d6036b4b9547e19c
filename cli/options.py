"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

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
from ..schedules import SCHEDULES
from ..workload import Optimizer

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
