"""Replicas that train apart, and links between nodes, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

JOB = "predict --model llama-3.2-1b --gpus 2x8xH100 --seq-len 4096 --global-batch 32".split()
SHARDED = [*JOB, "--zero", "3", "--dp-shard", "8"]


def predicted(invoke: Any, *arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_slow_link_is_waited_for_once_in_a_period(invoke: Any) -> None:
    slow = [*SHARDED, "--link-rate", "1Gbit/s"]
    together = predicted(invoke, *slow)
    apart = predicted(
        invoke, *slow, "--local-sgd", "100", "--outer", "diloco,fragments=4,delay=5,bits=4"
    )
    assert apart["label"] == "2xdiloco-100x4-d5-4bit_fsdp8_mbs1x2_bf16"
    settings = apart["plan"]["phases"][0]["settings"][0]["techniques"]["local-sgd"]
    assert settings == {
        "period": 100, "outer": "diloco", "fragments": 4, "delay": 5, "bits": 4,
    }  # fmt: skip
    assert [risk["technique"] for risk in apart["quality"]] == ["diloco"]
    assert together["quality"] == []

    def step_s(found: dict[str, Any]) -> float:
        return found["estimate"]["step_s"]["median"]

    assert step_s(apart) < 0.5 * step_s(together)
    plain = predicted(invoke, *slow, "--local-sgd", "100")
    assert plain["label"].startswith("2xdiloco-100_fsdp8")
    assert step_s(apart) < step_s(plain) < step_s(together)


def test_the_rate_of_a_link_is_that_of_the_plan(invoke: Any) -> None:
    found = predicted(invoke, *SHARDED, "--link-rate", "10Gbit/s")
    (pool,) = found["plan"]["cluster"]["pools"]
    assert pool["inter_node"]["bytes_per_s"] == 1.25e9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--local-sgd", "0"], "local-sgd.period=0: not positive"),
        (["--local-sgd", "8", "--outer", "dilco"], "did you mean diloco"),
        (["--local-sgd", "8", "--outer", "diloco,bits=four"], "outer.bits=four: not a whole"),
        (["--local-sgd", "8", "--outer", "diloco,bits=5"], "local-sgd.bits=5"),
        (["--local-sgd", "8", "--outer", "diloco,fragments=64"], "are groups of the 16 layers"),
        (["--local-sgd", "8", "--outer", "diloco,delay=8"], "give 0 to 7"),
        (["--outer", "co2"], "add --local-sgd"),
        (["--local-sgd", "8", "--pp", "2"], "stages of a pipeline would meet apart"),
        (["--local-sgd", "8", "--zero", "3"], "there is one replica"),
        (["--link-rate", "fast"], "write 100Mbit/s"),
    ],
)
def test_what_cannot_be_is_refused(
    refused: Callable[..., str], more: list[str], message: str
) -> None:
    assert message in refused([*JOB, *more], 2)


def test_one_node_has_no_link(refused: Callable[..., str]) -> None:
    one = [word.replace("2x8xH100", "8xH100") for word in JOB]
    assert "is one node" in refused([*one, "--link-rate", "1Gbit/s"], 2)
