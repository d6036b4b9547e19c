"""Every pair of techniques composes, or is refused with a reason."""

from __future__ import annotations

import math

import pairs
import pytest
from selections import Group

from forerun.costmodel import estimate
from forerun.errors import InputError
from forerun.executors.build import check_supported

REFUSED = {
    ("recompute", "storage"): "recompute full does not keep the activations to be stored",
    ("adamw-fp8", "adamw8bit"): "a workload has one optimiser",
    ("adamw-offload", "adamw-offload"): "has no host to offload to",
    ("adamw8bit", "expert-placement"): "routed experts, whose states it does not hold yet",
    ("expert-placement", "offload"): "experts, whose activations do not leave the device yet",
    ("halo", "storage"): "says itself what its linears keep",
    ("expert-placement", "halo"): "which do not work in 8 bits yet",
    ("expert-placement", "low-precision"): "routed experts, which do not work in 8 bits yet",
    ("gptq", "lora"): "frozen weights are stored in one way",
    ("lora", "storage"): "layers with adapters do not work in 8 bits yet",
    ("expert-placement", "lora"): "routed experts, which have no adapters yet",
}
"""Some that must be, and why; more may be while their techniques are only predicted."""
COMPOSED = (
    ("adamw-fp8", "adamw-fp8"), ("adamw-fp8", "low-precision"), ("adamw-fp8", "sequence-parallel"),
    ("adamw-fp8", "zero"), ("low-precision", "recompute"), ("low-precision", "storage"),
    ("low-precision", "zero"), ("sequence-parallel", "storage"), ("storage", "zero"),
    ("expert-placement", "zero"), ("halo", "zero"), ("halo", "recompute"), ("adamw-fp8", "halo"),
    ("halo", "sequence-parallel"),
    ("lora", "zero"), ("lora", "sequence-parallel"), ("gptq", "recompute"), ("lora", "offload"),
    ("adamw8bit", "lora"), ("context-parallel", "gptq"), ("adamw-fp8", "lora"),
    ("adamw8bit", "zero"), ("adamw4bit", "low-precision"), ("adamw-fp8-block", "storage"),
)  # fmt: skip
"""Some that must run."""


@pytest.mark.parametrize("pair", pairs.pairs(), ids="+".join)
def test_each_pair_is_priced_and_run_or_refused(pair: tuple[str, str]) -> None:
    try:
        plan = pairs.plan_of(*pair)
        check_supported(plan)
    except InputError as refused:
        assert refused.remedy and str(refused).count("\n") == 0
        assert pair not in COMPOSED, str(refused)
        assert REFUSED.get(pair, "") in str(refused)
        return
    assert pair not in REFUSED
    predicted = estimate(plan)
    assert math.isfinite(predicted.step_s.median) and predicted.step_s.median > 0
    assert predicted.memory_terms_bytes["parameters"] > 0


@pytest.mark.slow
def test_each_pair_that_is_not_refused_trains(group: Group) -> None:
    ranks = group(pairs.WORLD, "pairs")
    assert len(ranks[0]) == len(pairs.executed()) >= 40
    for rank in ranks:
        for pair, found in rank.items():
            assert "error" not in found, (pair, found["error"])
            losses = found["losses"]
            assert losses[-1] < losses[0], pair
