"""Orders of one's own: what is a schedule, what is refused, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from forerun.costmodel.schedule import orders as orders_of
from forerun.errors import InputError
from forerun.mesh import Mesh
from forerun.orders import (
    Orders,
    check_orders,
    order_texts,
    owners,
    parse_orders,
    splits,
    waiting_forever,
)
from forerun.plan import Plan, PlanFile, even_stages
from forerun.schedules import SCHEDULES, V_SCHEDULES, rank_of, schedule_of

CHUNKS = {"interleaved": 2, "interleaved-zb": 2, "zb-v": 2, "dualpipev": 2}


@st.composite
def known(draw: st.DrawFn) -> tuple[str, int, int, int, Orders]:
    """A schedule known by name with its shape and its orders."""
    name, p = draw(st.sampled_from(SCHEDULES)), draw(st.integers(2, 4))
    v, m = CHUNKS.get(name, 1), p * draw(st.integers(2, 3))
    return name, p, v, m, orders_of(name, p, v, m)


@given(known())
def test_schedules_known_by_name_are_orders(case: tuple[str, int, int, int, Orders]) -> None:
    name, p, v, m, orders = case
    check_orders(orders, p * v, m)
    assert parse_orders(order_texts(orders)) == orders
    assert owners(orders) == [rank_of(name, stage, p) for stage in range(p * v)]
    again = schedule_of(orders)
    assert (again in V_SCHEDULES) == (name in V_SCHEDULES)
    assert splits(orders) or again in ("1f1b", "interleaved")


@given(known(), st.data())
def test_a_missing_or_repeated_action_is_refused(
    case: tuple[str, int, int, int, Orders], data: st.DataObject
) -> None:
    _, p, v, m, orders = case
    rank = data.draw(st.integers(0, p - 1))
    at = data.draw(st.integers(0, len(orders[rank]) - 1))
    without = [
        order[:at] + order[at + 1 :] if r == rank else order for r, order in enumerate(orders)
    ]
    twice = [[*order, order[at]] if r == rank else order for r, order in enumerate(orders)]
    for wrong in (without, twice):
        with pytest.raises(InputError, match="orders="):
            check_orders(wrong, p * v, m)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"0": ("0F0", "0X0")}, "orders=0X0: not an action"),
        ({"1": ("0F0",)}, "orders=1: not the ranks from 0 on"),
        ({"0": ("0F0", "0B0"), "1": ("1B0", "1F0")}, "orders=1B0: cannot follow nothing"),
        ({"0": ("0F0", "0W0", "0I0"), "1": ("1F0", "1B0")}, "orders=0W0: cannot follow 0F0"),
        ({"0": ("0F0", "0B0", "2F0"), "1": ("1F0", "1B0")}, "2 stages and 1 micro-batches"),
        ({"0": ("0F0", "0B0"), "1": ("1F0", "0B0", "1B0")}, "stage 0 is on rank 0 already"),
        ({"0": ("0F0", "0I0"), "1": ("1F0", "1B0")}, "orders=0F0, 0I0: is all there is of"),
    ],
)
def test_what_is_no_schedule(texts: dict[str, tuple[str, ...]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_orders(parse_orders(texts), 2, 1)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    orders = parse_orders({"0": ("0F0", "0B0", "0F1", "0B1"), "1": ("1F0", "1F1", "1B0", "1B1")})
    assert waiting_forever(orders) == [("B", 0, 0), ("F", 1, 1)]
    with pytest.raises(InputError, match="orders=0B0, 1F1: wait for one another forever"):
        check_orders(orders, 2, 2)


def test_stages_lie_in_rounds_or_in_a_v() -> None:
    orders = parse_orders({"0": ("0F0", "1F0", "1B0", "0B0"), "1": ("2F0", "3F0", "3B0", "2B0")})
    with pytest.raises(InputError, match=r"orders=stages on ranks \[0, 0, 1, 1\]"):
        schedule_of(orders)


@pytest.fixture
def make_pipelined(plan_file: PlanFile) -> Callable[..., Plan]:
    """A plan of two pipeline ranks and four micro-batches with the orders of zb-h1, changed."""

    def make(**changes: object) -> Plan:
        plan = plan_file.plan
        phase = replace(
            plan.phase,
            mesh=Mesh(pp=2),
            stages=even_stages(2, 2, "cpu"),
            schedule="zb-h1",
            micro_batch_seqs=1,
            num_microbatches=4,
            orders=order_texts(orders_of("zb-h1", 2, 1, 4)),
        )
        return replace(plan, phases=(replace(phase, **changes),))

    return make


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schedule": "1f1b"}, "orders=I and W: 1f1b does not split the backward"),
        ({"num_microbatches": 2, "micro_batch_seqs": 2}, "orders=4 micro-batches: the plan has 2"),
    ],
)
def test_a_plan_edited_by_hand(
    make_pipelined: Callable[..., Plan], changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        make_pipelined(**changes).check()


def test_a_plan_with_orders_is_labelled_by_them(make_pipelined: Callable[..., Plan]) -> None:
    plan, other = make_pipelined(), make_pipelined(orders=order_texts(orders_of("zb-h2", 2, 1, 4)))
    plan.check()
    assert plan.label.split("_")[0].startswith("pp2-orders~")
    assert plan.label != other.label
    assert plan.phase.own_orders() == orders_of("zb-h1", 2, 1, 4)
    named = replace(plan.phase, orders=None)
    assert named.own_orders() is None and "pp2-zb-h1" in named.label
