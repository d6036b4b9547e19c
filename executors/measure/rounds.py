"""What is counted of a plan: the collectives of a step, or of a round of steps.

Where replicas train apart, steps after which they meet differ from the others, and these are all
alike: the steps of a round at which something happens are counted one by one, one of the others for
all of them, and what a plan moves per step is the mean over the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..local_sgd import Outer
from .comm import Call, CollectiveCounter, add_up

OTHERS = 0
"""The place of the steps of a round at which nothing happens."""


@dataclass(slots=True, kw_only=True)
class Counted:
    """Collectives of one rank by the place of a step in its round."""

    period: int = 1
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def at(self, place: int) -> list[Call]:
        """Those of the step at a place, 1 to period."""
        return self.calls.get(place, self.calls.get(OTHERS, []))

    def bytes_on_wire(self) -> dict[str, float]:
        """Bytes by `collective@axis`, in the mean over a round."""
        totals: dict[str, float] = {}
        num_others = self.period - len(self.calls.keys() - {OTHERS})
        for place, calls in self.calls.items():
            share = (num_others if place == OTHERS else 1) / self.period
            for name, size in add_up(calls).items():
                totals[name] = totals.get(name, 0.0) + share * size
        return dict(sorted(totals.items()))


def count_round(
    outer: Outer | None, step: Callable[[], None], counter: Callable[[], CollectiveCounter]
) -> Counted:
    """The collectives of a round of which `step` runs one step."""
    events = outer.events() if outer is not None else ()
    counted = Counted(period=outer.settings.period if outer is not None else 1)
    if outer is not None and outer.settings.steps_late == outer.settings.period:
        outer.skip_before(outer.settings.period)  # so that there is something to use
        step()
    others = [place for place in range(1, counted.period + 1) if place not in events]
    for place in [*events, *others[:1]]:
        if outer is not None:
            outer.skip_before(place)
        with counter() as seen:
            step()
        counted.calls[place if place in events else OTHERS] = seen.calls
    return counted
