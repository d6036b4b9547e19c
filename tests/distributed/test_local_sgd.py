"""Replicas that train apart: equal to what they are defined to be, counted, kept, and run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import apart
import families
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from selections import Group

from forerun import InputError, PlanFile
from forerun.catalogs import load_cluster
from forerun.cli.layout import fixed_plan
from forerun.costmodel import estimate
from forerun.executors import launch
from forerun.local_sgd import LocalSgd
from forerun.planner import Pins
from forerun.workload import Workload


def found(group: Group, world: int, name: str) -> list[dict[str, Any]]:
    ranks = [rank["apart", name] for rank in group(world, "quick")]
    assert not any("error" in rank for rank in ranks), ranks[0].get("error")
    return ranks


@pytest.mark.parametrize("name", apart.TOYS)
def test_the_outer_optimiser_is_what_it_is_defined_to_be(group: Group, name: str) -> None:
    expected = apart.simulate(LocalSgd(**apart.TOYS[name]))
    for rank, own in enumerate(found(group, 2, name)):
        for parameter, value in own.items():
            np.testing.assert_allclose(value, expected[rank][parameter], rtol=0, atol=1e-6)


def test_what_is_simulated_differs() -> None:
    ends = [apart.simulate(LocalSgd(**settings))[0] for settings in apart.TOYS.values()]
    firsts = [end["blocks.0.w"][0] for end in ends]
    assert len({round(float(x), 6) for x in firsts}) == len(firsts)


def test_co2_at_once_is_averaging() -> None:
    same = LocalSgd(period=3, outer="co2", delay=0, momentum=0.0, clip=1e9)
    average = apart.simulate(LocalSgd(**apart.TOYS["average"]))
    for one, other in zip(apart.simulate(same), average, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], atol=1e-12)


def test_meeting_after_every_step_is_synchronous_training(group: Group) -> None:
    for rank in found(group, 2, "as one"):
        (losses, parameters), (expected, same) = rank["apart"], rank["synchronous"]
        assert losses == pytest.approx(expected, rel=1e-6)
        for name, value in parameters.items():
            torch.testing.assert_close(value, same[name], rtol=0, atol=1e-6)


CASES = [(world, *case) for world, cases in apart.CASES.items() for case in cases]


@pytest.mark.parametrize(("world", "inside", "way"), CASES)
def test_predicted_bytes_are_those_counted(group: Group, world: int, inside: str, way: str) -> None:
    counted: dict[str, float] = {}
    for rank in found(group, world, f"{inside}, {way}"):
        for name, size in rank["bytes"].items():
            counted[name] = counted.get(name, 0.0) + size / world
    assert estimate(apart.plan_of(inside, way, world)).bytes_on_wire == pytest.approx(counted)


@pytest.mark.parametrize("way", ["streaming", "co2"])
def test_a_replica_of_several_ranks_trains_like_one(group: Group, way: str) -> None:
    (expected, *_), ranks = found(group, 2, f"single, {way}"), found(group, 4, f"fsdp, {way}")
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("way", apart.WAYS)
def test_replicas_learn_apart_and_meet(group: Group, way: str) -> None:
    ranks = found(group, 2, f"single, {way}")
    assert ranks[0]["losses"][-1] < ranks[0]["losses"][0]
    gaps = [
        float((value - ranks[1]["parameters"][name]).abs().max())
        for name, value in ranks[0]["parameters"].items()
    ]
    assert max(gaps) > 0.0, "between meetings"
    scale = max(float(v.abs().max()) for v in ranks[0]["parameters"].values())
    assert max(gaps) < 0.1 * scale


def test_few_bits_stay_near_the_whole_numbers(group: Group) -> None:
    whole = found(group, 2, "single, streaming")[0]["losses"]
    for bits, near in ((8, 1e-4), (4, 5e-3)):
        losses = found(group, 2, f"single, streaming {bits} bits")[0]["losses"]
        assert losses == pytest.approx(whole, rel=near)


@pytest.mark.parametrize("way", apart.KEPT)
def test_a_resumed_training_goes_on_to_the_bit(group: Group, way: str) -> None:
    for rank in found(group, 2, f"resume {way}"):
        assert rank["problem"] == ""
        assert rank["losses"][0] == rank["losses"][1]
        assert rank["equal"]


def plan_file(gpus: str = "2x1xcpu", **pins: Any) -> PlanFile:
    cluster = load_cluster(gpus)
    link = replace(cluster.pools[0].intra_node, bytes_per_s=2e6)
    cluster = replace(cluster, pools=(replace(cluster.pools[0], inter_node=link),))
    workload = Workload(seq_tokens=32, global_batch_seqs=4, steps=4)
    plan = fixed_plan(families.LLAMA, cluster, workload, Pins(**pins))
    return PlanFile(label=plan.label, plan=plan, estimate=estimate(plan))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="connections are paced by Linux")
def test_a_slow_link_is_emulated(tmp_path: Path) -> None:
    local = LocalSgd(period=4, fragments=2, delay=1)
    planned = plan_file(local_sgd=local)
    notes: list[str] = []
    measured = launch.run(
        planned, steps=4, emulate_links=True, on_note=notes.append, log_dir=tmp_path
    )
    assert notes == ["note: 8 steps, then 4 timed ones: whole rounds of 4"]
    assert measured.environment["emulated_links"] == "16 Mbit/s"
    predicted = planned.estimate
    assert measured.bytes_on_wire == pytest.approx(predicted.bytes_on_wire)
    live = sum(
        size
        for name, size in predicted.memory_terms_bytes.items()
        if name not in ("fragmentation", "context")
    )
    assert measured.peak_memory_bytes == pytest.approx(live, rel=0.05)
    # two fragments of a round go over the link, which is no faster than that
    transfer_s = 4 * families.LLAMA.num_params / 2e6
    waited_s = sum(measured.steps) + 1e-3
    assert waited_s > transfer_s / 2
    with pytest.raises(InputError, match="add --emulate-links"):
        launch.run(planned, steps=4)


def test_what_emulated_links_do_not_go_with() -> None:
    planned = plan_file(local_sgd=LocalSgd(period=2))
    with pytest.raises(InputError, match="pace=plan: all nodes are emulated here"):
        launch.run(planned, pace="plan", emulate_links=True)
    near = plan_file("2xcpu", local_sgd=LocalSgd(period=2))
    with pytest.raises(InputError, match="is one node, without links between"):
        launch.run(near, emulate_links=True)
    with pytest.raises(InputError, match="replicas that train apart meet"):
        launch.run(near, pace="plan")
