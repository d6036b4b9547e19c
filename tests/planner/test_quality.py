"""Classes of quality: what is allowed, what is accepted, and whose evidence a report names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from forerun.catalogs import load_cluster, load_model, load_technique, names
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.errors import InputError
from forerun.mesh import Mesh
from forerun.model import Model
from forerun.plan import Phase, Plan, Setting, even_stages
from forerun.planner import Pins, risks, search
from forerun.planner.keeping import policies, policies_under
from forerun.planner.quality import (
    CLASSES,
    accepted_names,
    classes_up_to,
    is_allowed,
    lines,
    record_names,
)
from forerun.schedules import SCHEDULES, SPLIT_SCHEDULES
from forerun.workload import Workload

WORKLOAD = Workload(seq_tokens=2048, global_batch_seqs=8)


def plan_of(model: Model, techniques: dict[str, Any], optimizer: str = "adamw") -> Plan:
    cluster = load_cluster("8xH100")
    phase = Phase(
        steps=1, seq_tokens=2048, micro_batch_seqs=1, num_microbatches=1,
        mesh=Mesh(dp_shard=8), zero=3,
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(Setting(layers=(0, model.num_layers - 1), techniques=techniques),),
    )  # fmt: skip
    workload = msgspec.structs.replace(WORKLOAD, optimizer=optimizer)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


@pytest.mark.parametrize("last", range(len(CLASSES)))
def test_a_class_stands_for_all_before_it(last: int) -> None:
    assert classes_up_to([CLASSES[last]]) == CLASSES[: last + 1]
    assert classes_up_to([CLASSES[last], "exact"]) == CLASSES[: last + 1]


def test_nothing_allowed_is_exact_alone() -> None:
    assert classes_up_to([]) == ("exact",) == Workload(seq_tokens=1, global_batch_seqs=1).quality


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: classes_up_to(["publish"]),
            "^allow=publish: unknown name; did you mean published",
        ),
        (lambda: accepted_names(["storag"]), "^accept-risk=storag:.*did you mean storage"),
    ],
)
def test_unknown_names(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("technique", names("techniques"))
def test_each_technique_is_used_as_its_class_or_its_name_allows(technique: str) -> None:
    needed = CLASSES.index(load_technique(technique).exactness)
    for index in range(len(CLASSES)):
        workload = msgspec.structs.replace(WORKLOAD, quality=CLASSES[: index + 1])
        assert is_allowed(workload, technique) == (index >= needed)
    accepted = msgspec.structs.replace(WORKLOAD, accepted=accepted_names([technique.upper()]))
    assert is_allowed(accepted, technique)


def test_exact_plans_have_no_risk() -> None:
    techniques = {"precision": {"compute": "bf16"}, "recompute": {"mode": "full"}}
    plan = plan_of(load_model("llama-2-7b"), techniques)
    assert risks(plan) == ()
    assert lines(()) == ["quality: exact, nothing changes results beyond rounding"]


def test_risks_name_setting_class_and_paper() -> None:
    precision = {"compute": "fp8", "recipe": "coat", "activations": "fp8"}
    plan = plan_of(load_model("llama-2-13b"), {"precision": precision}, "adamw_fp8")
    found = risks(plan)
    assert [(r.technique, r.setting, r.quality) for r in found] == [
        ("adamw-fp8", "optimizer adamw_fp8", "published"),
        ("low-precision", "compute fp8, recipe coat", "published"),
        ("storage", "activations fp8", "published"),
    ]
    assert "arXiv 2410.19313" in found[2].paper
    said = "\n".join(lines(found))
    assert "quality risk: storage (activations fp8), published" in said
    assert (
        "beyond the evidence: llama-2-13b has 13.0 B parameters, the evidence reaches 7 B" in said
    )


def test_weakest_evidence_comes_first() -> None:
    plan = plan_of(load_model("llama-2-7b"), {"precision": {"compute": "fp8"}}, "adamw_fp8_block")
    assert [risk.quality for risk in risks(plan)] == ["unquantified", "published"]


def test_evidence_up_to_7b_holds_for_7b() -> None:
    plan = plan_of(load_model("llama-2-7b"), {"precision": {"activations": "fp8"}})
    (risk,) = risks(plan)
    assert risk.beyond is None


def test_what_is_recalled_is_said() -> None:
    (risk,) = risks(plan_of(load_model("llama-3.2-1b"), {}, "adamw8bit"))
    assert any(line.endswith("(recalled)") for line in lines([risk]))


def test_every_optimizer_and_compute_dtype_has_a_record_or_is_exact() -> None:
    for optimizer in ("adamw8bit", "adamw4bit", "adamw_fp8", "adamw_fp8_block", "adamw_offload"):
        (record,) = record_names({}, optimizer)
        assert load_technique(record).exactness == (
            "exact" if optimizer == "adamw_offload" else load_technique(record).exactness
        )
    assert record_names({"precision": {"compute": "bf16"}}, "adamw") == {}


def test_plans_of_a_search_say_their_risk() -> None:
    found = search(
        load_model("llama-3.2-1b"), load_cluster("1xH100"), WORKLOAD,
        Pins(precision="fp8", recipe="coat", recompute="none", micro_batch=4), keep=1,
    )  # fmt: skip
    (plan,) = found.document()["plans"]
    assert [risk["technique"] for risk in plan["quality"]] == ["low-precision"]
    assert plan["label"].endswith("_fp8-coat")
    linears = found.plans[0].plan.phase.technique("precision").get("linears")
    assert linears is None or linears


@pytest.mark.parametrize(
    ("base", "allowed"),
    [
        (Options(compute="bf16"), True),
        (Options(compute="fp8", recipe="coat"), True),
        (Options(compute="fp8", recipe="rowwise"), False),  # keeps 16-bit inputs
        (Options(compute="bf16", activations="fp8"), False),  # is stored so whatever is chosen
    ],
)
def test_layers_may_store_their_activations_where_the_workload_says_so(
    base: Options, allowed: bool
) -> None:
    pools, model = load_cluster("8xH100").pools, load_model("llama-3.2-1b")

    def choices(workload: Workload, pins: Pins) -> set[str | None]:
        return {own.activations for own in policies(model, pools, workload, base, pins, ())}

    accepted = msgspec.structs.replace(WORKLOAD, accepted=("storage",))
    published = msgspec.structs.replace(WORKLOAD, quality=classes_up_to(["published"]))
    own, stored = {base.activations}, {base.activations, "fp8"}
    for workload in (accepted, published):
        for pins in (Pins(), Pins(run_only=True)):
            assert choices(workload, pins) == (stored if allowed else own)
        assert choices(workload, Pins(recompute="full")) == own
    below = msgspec.structs.replace(WORKLOAD, quality=classes_up_to(["measured-here"]))
    assert choices(below, Pins()) == choices(WORKLOAD, Pins()) == own


def test_backwards_are_not_split_around_stored_activations_that_are_to_be_run() -> None:
    pools = load_cluster("8xH100").pools
    found = (Options(compute="bf16"), Options(compute="bf16", activations="fp8"))
    for schedule in SCHEDULES:
        layout = Layouts.of(
            msgspec.structs.replace(plan_of(load_model("llama-2-7b"), {}).phase, schedule=schedule)
        )
        split = schedule in SPLIT_SCHEDULES
        here = policies_under(layout, found, pools, Pins(run_only=True))
        assert here == (found[:1] if split else found)
        assert policies_under(layout, found, pools, Pins()) == found
