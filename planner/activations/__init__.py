"""Per saved tensor of a layer: keep it, make it again, move a fraction to the host, compress it.

`solve` gives the fastest choice within limits on device, host and copies, with its proof;
`frontier` what one layer can trade, with the convex hull that bounds every mixture of layers from
below; `layer_types` and `read_tensors` make problems, from a model or from a table.
"""

from __future__ import annotations

from .check import violations
from .policies import Policies, policies
from .problem import LayerType, Limits, Maker, Problem, SavedTensor
from .relax import Frontier, bound, frontier, token_fraction
from .solution import PolicyUse, Solution, TensorChoice
from .solve import least_bytes, solve
from .stage import first_stage
from .table import read_tensors
from .tensors import Setting, layer_types

__all__ = [
    "Frontier", "LayerType", "Limits", "Maker", "Policies", "PolicyUse", "Problem", "SavedTensor",
    "Setting", "Solution", "TensorChoice", "bound", "first_stage", "frontier", "layer_types",
    "least_bytes", "policies", "read_tensors", "solve", "token_fraction", "violations",
]  # fmt: skip
