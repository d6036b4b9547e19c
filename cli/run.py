"""forerun run: execute a plan and write what really happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .. import document, units
from ..errors import InputError
from .log import say
from .options import POSITIVE, common_options, output_option, plan_argument
from .plan_files import read_plan_file
from .progress import step_progress

if TYPE_CHECKING:
    from ..executors.job import Training
    from ..executors.machine import Nodes

SAME_FOLDER = ""
"""What --resume says without a folder of its own."""

TRAINING_OPTIONS = (
    click.option(
        "--until",
        metavar="LOSS|TIME",
        help="Train until the mean loss of 10 steps is no higher (2.5), or for that long "
        "(90s, 30m, 2h); --steps, where given, ends it too.",
    ),
    click.option(
        "--checkpoint",
        metavar="DIR",
        help="Train, and keep checkpoints in this folder; --steps then counts all steps.",
    ),
    click.option("--every", type=POSITIVE, help="Steps between checkpoints. [default: 100]"),
    click.option("--keep", type=POSITIVE, help="Newest checkpoints that are kept. [default: 3]"),
    click.option(
        "--resume",
        metavar="[DIR]",
        is_flag=False,
        flag_value=SAME_FOLDER,
        help="Go on from the newest whole checkpoint of DIR, or of --checkpoint; the layout may "
        "be another.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        help="Times that lost ranks start again from the last checkpoint. "
        "[default: 3 with --checkpoint, else 0]",
    ),
    click.option(
        "--grace",
        metavar="TIME",
        default="30s",
        show_default=True,
        help="What ranks get, after Ctrl-C or SIGTERM, to end a step and write a checkpoint.",
    ),
    click.option("--metrics", metavar="FILE", help="Write a JSONL line per step to this file."),
    click.option(
        "--tensorboard", metavar="DIR", help="Write event files for TensorBoard to this folder."
    ),
)

NODE_OPTIONS = (
    click.option("--nnodes", type=POSITIVE, help="Machines that run the plan together."),
    click.option("--node-rank", type=click.IntRange(min=0), help="Place of this one, from 0."),
    click.option("--rendezvous", metavar="HOST:PORT", help="Node 0's address and a free port."),
)


def extra_options(function: Any) -> Any:
    """The options of a training and of a run on several machines."""
    for option in reversed(TRAINING_OPTIONS + NODE_OPTIONS):
        function = option(function)
    return function


@click.command("run")
@plan_argument
@output_option("the measurement")
@click.option("--steps", type=POSITIVE, help="Timed steps; default: the plan's.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Steps before the timed ones.",
)
@click.option("--data", help="File or folder of text or JSONL in place of the plan's.")
@click.option(
    "--static-memory",
    type=click.Choice(["report", "run"]),
    help="Solve for offsets of a step's tensors: report what they save, or run out of one arena.",
)
@click.option(
    "--offload-dir",
    type=click.Path(path_type=Path),
    help="Folder for files of offloaded tensors; default: that of temporary files.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Folder with the weights that adapters train beside: of run --checkpoint, or quantize -o; "
    "default: initial ones.",
)
@click.option("--model", help="package.module:function, again, for a plan of one's own module.")
@extra_options
@click.option(
    "--pace",
    metavar="DEVICE",
    help="Emulate: CPU processes hold every chunk to the time predicted for this device (H100, a "
    "profile's file, or plan: the plan's own); for schedules, not for speed.",
)
@click.option(
    "--pace-scale",
    type=float,
    metavar="FACTOR",
    help="Seconds here per emulated second; default: such that real work is short beside it.",
)
@click.option(
    "--emulate-links",
    is_flag=True,
    help="Run all nodes of the plan as processes of this machine, what they send one another held "
    "to the rate of the plan's link between nodes (Linux).",
)
@common_options
def command(
    as_json: bool,
    plan_path: Path,
    output: Path | None,
    steps: int | None,
    warmup: int,
    data: str | None,
    static_memory: Literal["report", "run"] | None,
    offload_dir: Path | None,
    base: Path | None,
    model: str | None,
    pace: str | None,
    pace_scale: float | None,
    emulate_links: bool,
    max_restarts: int | None,
    grace: str,
    **flags: Any,
) -> None:
    """Train as PLAN says, on this machine, and measure every term of the prediction.

    With --checkpoint, --until, --metrics or --tensorboard it is a training run: docs/runs.md.
    """
    from ..executors import run
    from . import render

    plan_file = read_plan_file(plan_path)
    training = read_training(flags)
    with step_progress(plan_file.label) as on_progress:
        measurement = run(
            plan_file,
            steps=steps,
            warmup_steps=warmup,
            data=data,
            on_progress=on_progress,
            on_note=say,
            module=model,
            offload_folder=offload_dir,
            base=base,
            static_memory=static_memory,
            training=training,
            max_restarts=max_restarts,
            grace_s=units.parse_duration(grace, "grace"),
            nodes=read_nodes(flags),
            pace=pace,
            pace_scale=pace_scale,
            emulate_links=emulate_links,
        )
    if output is not None:
        document.write(output, measurement)
    if as_json:
        render.print_json(measurement)
    else:
        render.print_measurement(measurement)


def read_training(flags: dict[str, Any]) -> Training | None:
    """What a training run was asked to keep and when it ends; None for a measuring run."""
    from ..executors.job import Training

    checkpoint, resume = flags["checkpoint"], flags["resume"]
    if resume == SAME_FOLDER and checkpoint is None:
        raise InputError("resume", "(no folder)", "nothing says where checkpoints are",
                         "write --resume DIR, or --checkpoint DIR --resume")  # fmt: skip
    resume = checkpoint if resume == SAME_FOLDER else resume
    checkpoint = checkpoint or resume
    if checkpoint is None:
        for name in ("every", "keep"):
            if flags[name] is not None:
                raise InputError(name, flags[name], "is about checkpoints",
                                 "add --checkpoint DIR")  # fmt: skip
    until_loss, until_s = read_until(flags["until"])
    given = (checkpoint, flags["until"], flags["metrics"], flags["tensorboard"])
    if all(value is None for value in given):
        return None
    defaults = Training()
    return Training(
        checkpoint=checkpoint,
        every=flags["every"] or defaults.every,
        keep=flags["keep"] or defaults.keep,
        resume=resume,
        until_loss=until_loss,
        until_s=until_s,
        metrics=flags["metrics"],
        tensorboard=flags["tensorboard"],
    )


def read_until(text: str | None) -> tuple[float | None, float | None]:
    """A loss, or a time in seconds.

    >>> read_until("2.5"), read_until("30m"), read_until(None)
    ((2.5, None), (None, 1800.0), (None, None))
    """
    if text is None:
        return None, None
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text), None
    try:
        return None, units.parse_duration(text, "until")
    except InputError as error:
        raise InputError("until", text, "neither a loss nor a time",
                         "write 2.5, or 90s, 30m, 2h") from error  # fmt: skip


def read_nodes(flags: dict[str, Any]) -> Nodes | None:
    """This machine's place among several; None where it is alone."""
    from ..executors.machine import Nodes

    given = {name: flags[name] for name in ("nnodes", "node_rank", "rendezvous")}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise InputError(missing[0].replace("_", "-"), "(missing)",
                         "several machines need all three",
                         "write --nnodes N --node-rank I --rendezvous HOST:PORT")  # fmt: skip
    return Nodes(num=given["nnodes"], node=given["node_rank"], rendezvous=given["rendezvous"])
