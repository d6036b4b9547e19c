"""The cost model's memory ledger against the storages that a real step makes."""

from __future__ import annotations

import pytest

from forerun.costmodel import estimate
from forerun.model import Model

from .small import LONG, MODELS, ROUTED, counted, make_plan, make_trainer

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model, id=model.name) for model in (*MODELS, *ROUTED)),
        *(pytest.param(model, id=model.name, marks=pytest.mark.slow) for model in LONG),
    ],
)
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(
    ("compute", "recompute"),
    [("fp32", "none"), ("fp32", "selective"), ("fp32", "full"), ("bf16", "none")],
)
def test_predicted_peak_is_the_counted_one(
    model: Model, num_microbatches: int, compute: str, recompute: str
) -> None:
    plan = make_plan(model, compute, recompute, num_microbatches)
    terms = estimate(plan).memory_terms_bytes
    predicted = sum(n for t, n in terms.items() if t not in ("fragmentation", "context"))
    live = counted(make_trainer(plan), plan)
    assert predicted == pytest.approx(sum(live.peak().values()), rel=0.05)
