"""One question to the planner - a model, a cluster, a workload, pins - and its answer as a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...cluster import Cluster
from ...document import Value, to_raw
from ...errors import InputError, NoFeasiblePlan
from ...estimate import Estimate
from ...model import Model
from ...workload import Workload
from ..candidates import CostModel, OwnCost, Request, bound_all, may_fit
from ..pins import Pins, check_pins
from ..search import search

Fit = Literal["yes", "marginal"]
Status = Literal["planned", "infeasible", "refused", "left out"]
Report = Callable[[float, float, str], None]
"""Called with (done, total, what is asked next)."""
TIME_IS_UP = "not asked: the time limit struck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the planner is asked."""

    model: Model
    cluster: Cluster
    workload: Workload
    pins: Pins


class Row(Value, frozen=True, kw_only=True):
    """The best plan for one ask, or why there is none."""

    model: str
    num_params: int
    gpus: str
    num_devices: int
    seq_tokens: int
    global_batch_seqs: int
    status: Status
    """refused: no legal layout, or pins that the devices cannot follow."""
    reason: str = ""
    """Why there is no plan; of a plan, what is special about it."""
    smallest_change: str = ""
    label: str | None = None
    estimate: Estimate | None = None
    gap: float | None = None
    """What `SearchStats.gap` says of the search behind the row."""
    price_usd_per_hour: float | None = None
    """Of the whole cluster."""

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.seq_tokens * self.global_batch_seqs

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the whole cluster; zero without a plan."""
        return 0.0 if self.estimate is None else self.estimate.tokens_per_s

    @property
    def usd_per_billion_tokens(self) -> float | None:
        """Price of 10^9 tokens: price per hour / tokens per hour."""
        if self.price_usd_per_hour is None or self.estimate is None:
            return None
        return 1e9 * self.price_usd_per_hour / (3600 * self.tokens_per_s)

    def run_s(self, tokens: float) -> float | None:
        """Seconds that a run of so many tokens takes, without interruptions."""
        return None if self.estimate is None else tokens / self.tokens_per_s

    def run_usd(self, tokens: float) -> float | None:
        """What a run of so many tokens costs."""
        price = self.usd_per_billion_tokens
        return None if price is None else price * tokens / 1e9

    def document(self, tokens: float | None = None) -> dict[str, Any]:
        """The row as plain values, derived numbers included."""
        raw = to_raw(self) | {
            "global_batch_tokens": self.global_batch_tokens,
            "usd_per_billion_tokens": self.usd_per_billion_tokens,
        }
        if tokens is not None:
            raw |= {"run_s": self.run_s(tokens), "run_usd": self.run_usd(tokens)}
        return raw


class TimeIsUp(Exception):
    """The deadline passed before a question was asked."""


@dataclass(slots=True, kw_only=True)
class Asker:
    """Asks the planner until a deadline, and keeps every row in the order of the asks.

    `deadline` is a value of `clock`; None = no limit. A search that is under way when it strikes
    ends with the best plan so far (the row says so).
    """

    clock: Callable[[], float]
    deadline: float | None
    fit: Fit
    report: Report | None = None
    cost: CostModel | None = None
    rows: list[Row]
    struck: bool = False
    refusal: InputError | None = None
    """The last refusal, for when there is nothing else to say."""

    def ask(self, ask: Ask, *, total: float = 0, explain: bool = True) -> int:
        """Ask, and give the index of the new row.

        `explain` False leaves out the search for the smallest change where nothing can fit.
        Raises TimeIsUp when the deadline has passed.
        """
        if self.report is not None:
            self.report(len(self.rows), total, describe(ask))
        left = None if self.deadline is None else self.deadline - self.clock()
        if left is not None and left <= 0:
            self.struck = True
            raise TimeIsUp
        row, limit = self._plan(ask, left, explain)
        self.struck = self.struck or limit == "time"
        self.rows.append(row)
        return len(self.rows) - 1

    def _plan(self, ask: Ask, left: float | None, explain: bool) -> tuple[Row, str | None]:
        try:
            if not explain and not self._hopeful(ask):
                reason = "no layout's lower bound of memory is within a device"
                return row_of(ask, "infeasible", reason=reason), None
            return self._best(ask, left)
        except InputError as error:
            self.refusal = error
            return row_of(ask, "refused", reason=str(error), smallest_change=error.remedy), None
        except NoFeasiblePlan as error:
            return row_of(
                ask, "infeasible", reason=error.reason, smallest_change=error.smallest_change
            ), None

    def _hopeful(self, ask: Ask) -> bool:
        """Whether any layout may fit, or none is legal, which the search explains."""
        check_pins(ask.pins, [pool.device for pool in ask.cluster.pools])
        cost = OwnCost() if self.cost is None else self.cost
        candidates = bound_all(
            Request(ask.model, ask.cluster, ask.workload, ask.pins, cost, fit=self.fit)
        )
        return not len(candidates) or may_fit(candidates)

    def _best(self, ask: Ask, left: float | None) -> tuple[Row, str | None]:
        """The fastest plan that fits as asked."""
        result = search(
            ask.model,
            ask.cluster,
            ask.workload,
            ask.pins,
            keep=1,
            fit=self.fit,
            time_limit_s=left,
            cost=self.cost,
            clock=self.clock,
        )
        limit = result.stats.limit
        if result.infeasible is not None:
            return row_of(
                ask,
                "infeasible",
                reason=result.infeasible.reason,
                smallest_change=result.infeasible.smallest_change,
            ), limit
        best = result.plans[0]
        return row_of(
            ask,
            "planned",
            reason="best so far when the time limit struck" if limit == "time" else "",
            label=best.label,
            estimate=best.estimate,
            gap=result.stats.gap,
        ), limit


def row_of(ask: Ask, status: Status, **found: Any) -> Row:
    """A row with the question's part filled in."""
    pools = ask.cluster.pools
    prices = [pool.price_usd_per_hour for pool in pools]
    known = [price for price in prices if price is not None]
    price = sum(p * pool.num_devices for p, pool in zip(known, pools, strict=False))
    return Row(
        model=ask.model.name,
        num_params=ask.model.num_params,
        gpus=ask.cluster.name,
        num_devices=ask.cluster.num_devices,
        seq_tokens=ask.workload.seq_tokens,
        global_batch_seqs=ask.workload.global_batch_seqs,
        status=status,
        price_usd_per_hour=price if len(known) == len(pools) else None,
        **found,
    )


def describe(ask: Ask) -> str:
    """An ask in a few words.

    >>> from forerun.catalogs import load_model, resolve_gpus
    >>> work = Workload(seq_tokens=1024, global_batch_seqs=8)
    >>> cluster = resolve_gpus("8xH100").cluster
    >>> describe(Ask(model=load_model("tiny-1m"), cluster=cluster, workload=work, pins=Pins()))
    'tiny-1m on 8xH100, 8 x 1,024 tokens'
    """
    work = ask.workload
    size = f"{work.global_batch_seqs:,} x {work.seq_tokens:,} tokens"
    return f"{ask.model.name} on {ask.cluster.name}, {size}"
