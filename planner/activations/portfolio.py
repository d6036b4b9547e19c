"""Few sets of tensors to keep that serve a whole grid: the corners of frontiers, thinned out.

What is worth keeping of a layer changes little from layout to layout, so that a search need not
solve every one of them. For some layouts of the grid the exact frontier of every layer type is
known (`policies.py`). With s the price of a byte in seconds, e_g and b_g what a layer of group g
adds and stores, N_g layers,

    best(l, s)    = sum_g N_g min over policies of  e_g + s b_g       of layout l
    cost(l, s, K) = sum_g N_g (e_g + s b_g)  where layers keep the set K
    minimise        sum over l, s of  min over chosen K of  cost(l, s, K) / best(l, s)

over sets of at most a given number of sets K, greedily; keeping everything and keeping the input
alone are chosen already. Candidates are, for every l and s, the tensors that the best policies
store, of all groups together. Prices are the slopes of the frontiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .policies import STORED, Policies, policies
from .problem import LayerType, Limits
from .relax import lower_hull

Names = tuple[str, ...]
NO_LIMITS = Limits(device_bytes=float("inf"))


def keep_sets(layouts: Sequence[Sequence[LayerType]], most: int) -> tuple[Names, ...]:
    """At most so many sets of tensors to keep, those with the most bytes first; `layouts` are the
    layer types of a model under some layouts."""
    found = [[policies(layer, NO_LIMITS) for layer in layers] for layers in layouts]
    prices = [_prices(groups) for groups in found]
    candidates: dict[Names, None] = {}
    for groups, some in zip(found, prices, strict=True):
        for price in some:
            candidates[_stored(groups, price)] = None
    every = (*(_everything(layers) for layers in layouts[:1]), ())
    names = [*every, *(names for names in candidates if names not in every)]
    costs = np.stack([_costs(layouts, prices, keep) for keep in names])
    best = np.concatenate([_best(groups, s) for groups, s in zip(found, prices, strict=True)])
    regret = costs / np.maximum(best, 1e-30)
    chosen = list(range(len(every)))
    now = regret[chosen].min(axis=0)
    for _ in range(most):
        gains = [float(np.sum(now - np.minimum(now, row))) for row in regret]
        index = int(np.argmax(gains))
        if gains[index] < WORTH * len(now):
            break
        chosen.append(index)
        now = np.minimum(now, regret[index])
    sets = [names[i] for i in chosen[len(every) :]]
    return tuple(sorted(sets, key=lambda keep: -_bytes(layouts[0], keep)))


WORTH = 5e-4
"""Mean gain, relative to the best, that a further set must bring."""


def stored_and_seconds(layer: LayerType, keep: Names) -> tuple[float, float]:
    """Bytes stored, and seconds of what runs again, where a layer keeps its input and `keep`."""
    made = {name: i for i, maker in enumerate(layer.makers) for name in maker.outputs}
    kept = {t.name for t in layer.tensors if t.name in keep or t.name not in made}
    wanted = {t.name for t in layer.tensors if t.needed} - kept
    seconds = 0.0
    for index in reversed(range(len(layer.makers))):
        maker = layer.makers[index]
        if wanted.intersection(maker.outputs):
            seconds += maker.seconds
            wanted |= {n for n in maker.inputs if made.get(n, -1) < index and n in made} - kept
    return sum(t.bytes for t in layer.tensors if t.name in kept), seconds


def _prices(groups: Sequence[Policies]) -> np.ndarray:
    """Slopes of the frontiers, seconds per byte."""
    found: set[float] = set()
    for one in groups:
        seconds = one.forward_s + one.backward_s
        corners = lower_hull(one.stored_bytes, seconds)
        for left, right in pairwise(corners):
            width = one.stored_bytes[right] - one.stored_bytes[left]
            found.add(float((seconds[left] - seconds[right]) / width) * (1 + 1e-9))
    return np.array(sorted(found))


def _stored(groups: Sequence[Policies], price: float) -> Names:
    """The tensors that the best policies store at a price, of all groups."""
    names: dict[str, None] = {}
    for one in groups:
        at = int(np.argmin(one.forward_s + one.backward_s + price * one.stored_bytes))
        for tensor, code in zip(one.layer.tensors, one.codes[at], strict=True):
            if code == STORED and any(tensor.name in m.outputs for m in one.layer.makers):
                names[tensor.name] = None
    return tuple(names)


def _best(groups: Sequence[Policies], prices: np.ndarray) -> np.ndarray:
    total = np.zeros(len(prices))
    for one in groups:
        seconds = one.forward_s + one.backward_s
        total += one.layer.count * np.min(seconds[:, None] + prices * one.stored_bytes[:, None], 0)
    return total


def _costs(
    layouts: Sequence[Sequence[LayerType]], prices: Sequence[np.ndarray], keep: Names
) -> np.ndarray:
    parts: list[np.ndarray] = []
    for layers, some in zip(layouts, prices, strict=True):
        total = np.zeros(len(some))
        for layer in layers:
            stored, seconds = stored_and_seconds(layer, keep)
            total += layer.count * (seconds + some * stored)
        parts.append(total)
    return np.concatenate(parts)


def _bytes(layers: Sequence[LayerType], keep: Names) -> float:
    return sum(layer.count * stored_and_seconds(layer, keep)[0] for layer in layers)


def _everything(layers: Sequence[LayerType]) -> Names:
    """All that backward needs."""
    return tuple(dict.fromkeys(t.name for x in layers for t in x.tensors if t.needed))
