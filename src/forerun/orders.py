"""Orders: what each pipeline rank does one after the other, in the words that plan files use.

An action is (kind, stage, micro-batch), written stage first: `3F12`. F is a forward; B a backward,
or I and W its two halves, for the stage's input and for its weights. Orders of one's own stand in
`Phase.orders`, one list per pipeline rank; the schedules known by name make theirs when needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .errors import InputError

Action = tuple[str, int, int]
Orders = list[list[Action]]

ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


def action_text(action: Action) -> str:
    """An action as plans and torch write it.

    >>> action_text(("I", 3, 12))
    '3I12'
    """
    kind, stage, micro = action
    return f"{stage}{kind}{micro}"


def parse_action(text: str) -> Action:
    """The action of a text.

    >>> parse_action("3I12")
    ('I', 3, 12)
    """
    found = ACTION.fullmatch(text.strip())
    if found is None:
        raise InputError("orders", text, "not an action",
                         "write stage, one of F, B, I, W and micro-batch, such as 0F3")  # fmt: skip
    return found[2], int(found[1]), int(found[3])


def order_texts(orders: Orders) -> dict[str, tuple[str, ...]]:
    """Orders as plans hold them: the actions of every rank as texts."""
    return {str(rank): tuple(map(action_text, order)) for rank, order in enumerate(orders)}


def parse_orders(texts: Mapping[str, Sequence[str]]) -> Orders:
    """The orders of a plan; its keys are the ranks, 0 and up."""
    wanted = [str(rank) for rank in range(len(texts))]
    if sorted(texts) != sorted(wanted):
        raise InputError("orders", ", ".join(texts), "not the ranks from 0 on",
                         f"name them {', '.join(wanted)}")  # fmt: skip
    return [[parse_action(text) for text in texts[rank]] for rank in wanted]


def owners(orders: Orders) -> list[int]:
    """The rank of every stage, in the model's order.

    >>> owners([[("F", 0, 0), ("F", 3, 0)], [("F", 1, 0), ("F", 2, 0)]])
    [0, 1, 1, 0]
    """
    found = {stage: rank for rank, order in enumerate(orders) for stage in {a[1] for a in order}}
    return [found[stage] for stage in sorted(found)]


def splits(orders: Orders) -> bool:
    """Whether any backward is split into its two halves."""
    return any(kind in "IW" for order in orders for kind, _, _ in order)


def check_orders(orders: Orders, num_stages: int, num_microbatches: int) -> None:
    """Raise InputError unless the orders are a schedule that ends.

    Every stage lies on one rank and does, for every micro-batch once, F and then B, or F, I and
    then W; and no rank waits for an action that waits for it.
    """
    home: dict[int, int] = {}
    done: dict[tuple[int, int], str] = {}
    for rank, order in enumerate(orders):
        for action in order:
            kind, stage, micro = action
            if stage >= num_stages or micro >= num_microbatches:
                raise InputError("orders", action_text(action),
                                 f"the plan has {num_stages} stages and {num_microbatches} "
                                 "micro-batches", "number both from 0")  # fmt: skip
            if home.setdefault(stage, rank) != rank:
                raise InputError("orders", action_text(action),
                                 f"stage {stage} is on rank {home[stage]} already, not on {rank}",
                                 "give a stage to one rank")  # fmt: skip
            before = done.get((stage, micro), "")
            if before + kind not in ("F", "FB", "FI", "FIW"):
                raise InputError("orders", action_text(action),
                                 f"cannot follow {_word(before, stage, micro)}",
                                 "do F and B, or F, I and W, of each once")  # fmt: skip
            done[stage, micro] = before + kind
    for stage in range(num_stages):
        for micro in range(num_microbatches):
            whole = done.get((stage, micro), "")
            if whole not in ("FB", "FIW"):
                raise InputError("orders", _word(whole, stage, micro),
                                 f"is all there is of stage {stage} and micro-batch {micro}",
                                 "do F and B, or F, I and W, of each once")  # fmt: skip
    stuck = waiting_forever(orders)
    if stuck:
        raise InputError("orders", ", ".join(map(action_text, stuck)),
                         "wait for one another forever", "let forwards go down the stages in order "
                         "and backwards up")  # fmt: skip


def _word(kinds: str, stage: int, micro: int) -> str:
    texts = [action_text((kind, stage, micro)) for kind in kinds]
    return ", ".join(texts) if texts else "nothing"


def waiting_forever(orders: Orders) -> list[Action]:
    """The actions at which the ranks are stuck; none when the orders can be played to their end.

    F waits for F of the stage before, I and B for the gradient that the stage behind makes.
    """
    num_stages = 1 + max((stage for order in orders for _, stage, _ in order), default=0)
    done: set[tuple[str, int, int]] = set()
    at = [0] * len(orders)
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order) and _can_start(order[at[rank]], done, num_stages):
                kind, stage, micro = order[at[rank]]
                done.add(("B" if kind == "I" else kind, stage, micro))
                at[rank] += 1
                progress = True
    return [order[k] for order, k in zip(orders, at, strict=True) if k < len(order)]


def _can_start(action: Action, done: set[tuple[str, int, int]], num_stages: int) -> bool:
    kind, stage, micro = action
    if kind == "F":
        return stage == 0 or ("F", stage - 1, micro) in done
    if kind == "W" or stage == num_stages - 1:
        return True
    return ("B", stage + 1, micro) in done
