"""What `forerun run` makes of its options for training and for several machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forerun import Measurement, PlanFile
from forerun.executors.job import Training
from forerun.executors.machine import Nodes

Files = tuple[Path, Path]


@pytest.fixture
def asked(
    measurement_of: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """What the executor was asked."""
    seen: list[dict[str, Any]] = []

    def run(plan_file: PlanFile, **options: Any) -> Measurement:
        seen.append(options)
        options["on_progress"](3, 0, 5.0)
        options["on_note"]("warning: restart 1: a rank was lost; going on from step 2")
        return measurement_of(plan_file)

    monkeypatch.setattr("forerun.executors.run", run, raising=False)
    return seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("--checkpoint c", Training(checkpoint="c")),
        ("--checkpoint c --every 7 --keep 1", Training(checkpoint="c", every=7, keep=1)),
        ("--checkpoint c --resume", Training(checkpoint="c", resume="c")),
        ("--resume d", Training(checkpoint="d", resume="d")),
        ("--resume d --checkpoint c", Training(checkpoint="c", resume="d")),
        ("--until 2.5", Training(until_loss=2.5)),
        ("--until 30m --metrics m.jsonl", Training(until_s=1800.0, metrics="m.jsonl")),
        ("--tensorboard t", Training(tensorboard="t")),
    ],
)
def test_options_of_a_training(
    invoke: Any, files: Files, asked: list[dict[str, Any]], words: str, expected: Training | None
) -> None:
    result = invoke("run", files[0], *words.split())
    assert result.exit_code == 0, result.output
    assert asked[0]["training"] == expected and asked[0]["grace_s"] == 30
    assert "warning: restart 1" in result.stderr


def test_options_of_several_machines(
    invoke: Any, files: Files, asked: list[dict[str, Any]]
) -> None:
    words = "--nnodes 2 --node-rank 1 --rendezvous host:29500 --grace 2m --max-restarts 5"
    assert invoke("run", files[0], *words.split()).exit_code == 0
    assert asked[0]["nodes"] == Nodes(num=2, node=1, rendezvous="host:29500")
    assert (asked[0]["grace_s"], asked[0]["max_restarts"]) == (120, 5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--resume", "resume=(no folder): nothing says where checkpoints are"),
        ("--every 5", "every=5: is about checkpoints; add --checkpoint DIR"),
        ("--until soon", "until=soon: neither a loss nor a time"),
        ("--nnodes 2", "node-rank=(missing): several machines need all three"),
        ("--grace 5", "grace=5: not a duration"),
        ("--nnodes 2 --node-rank 1 --rendezvous nowhere", "rendezvous=nowhere: is not HOST:PORT"),
        ("--nnodes 2 --node-rank 2 --rendezvous localhost:9", "node-rank=2: is no place among 2"),
        ("--nnodes 3 --node-rank 0 --rendezvous localhost:9", "nnodes=3: does not divide the 2 x"),
    ],
)
def test_options_that_make_no_sense(refused: Any, files: Files, words: str, said: str) -> None:
    assert said in refused(["run", files[0], *words.split()], 2)
