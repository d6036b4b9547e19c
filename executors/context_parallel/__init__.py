"""Context parallelism: one sequence over several ranks, by a ring, by exchanging heads, or both.

Everything but attention works token by token, so that a rank holds its tokens throughout and only
attention communicates. `Spread` says which tokens a rank holds and makes the `Context` of a
micro-batch; `Attention` passes its queries, keys and values through the context's exchange and
method. Ranks that share a sequence count as data-parallel ranks for gradients.
"""

from .chunks import Borders, as_borders
from .context import Context, Slot, attend
from .spread import Spread, over_mesh
from .ulysses import Exchange, repeated, to_tokens

__all__ = [
    "Borders", "Context", "Exchange", "Slot", "Spread", "as_borders", "attend", "over_mesh",
    "repeated", "to_tokens",
]  # fmt: skip
