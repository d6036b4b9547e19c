"""A user's module cut for tensor parallelism, as its `tp_plan` says.

`tp_plan` maps names of submodules (`*` stands for one part of a name) to what Hugging Face's plans
call their styles:

    colwise                 a linear whose outputs are divided; its input is whole
    rowwise                 a linear whose inputs are divided; its output is summed
    colwise_gather_output   colwise, and the output is gathered (colwise_rep is the older name)
    embedding_rowwise       a table whose rows are divided; what others hold is summed
    colwise_logits          colwise, of logits that the module returns; the loss is computed on them

Each rank holds its cut as a plain parameter, as in `tensor_parallel.py`, whose collectives are used
here: a sum in backward where a whole tensor enters divided matrices - one for all of them that read
the same tensor -, a sum in forward where it leaves. `Links` is what the collectives are made by:
`GroupLinks` when training, `trace_links.TraceLinks` when a module is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .tensor_parallel import Enter, Leave
from .torch_compat import all_gather_single
from .vocab_loss import vocab_loss

COLUMNS = ("colwise", "colwise_gather_output", "colwise_logits")
STYLES = (*COLUMNS, "rowwise", "embedding_rowwise")
ALIASES = {"colwise_rep": "colwise_gather_output"}


class Links(Protocol):
    """The ranks of a tensor-parallel group, as a cut module sees them."""

    rank: int
    size: int

    def enter(self, x: Tensor) -> Tensor:
        """`x` for divided matrices; its gradients are summed over the group."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """The sum of `x` over the group, in place."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' parts of the last dimension; its gradient is this rank's part."""
        ...

    def loss(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy of divided logits against whole targets."""
        ...


class GatherLast(torch.autograd.Function):
    """All ranks' parts of the last dimension; in backward this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, rank: int) -> Tensor:
        ctx.rank, ctx.width = rank, part.shape[-1]
        stacked = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        all_gather_single(stacked, part.contiguous(), group=group)
        return torch.cat(stacked.chunk(group.size()), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(-1, ctx.rank * ctx.width, ctx.width).contiguous(), None, None


class GroupLinks:
    """The collectives of a process group."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size()

    def enter(self, x: Tensor) -> Tensor:
        entered: Any = Enter.apply(x, self.group, False)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        left: Any = Leave.apply(x, self.group, False)
        return left

    def gather(self, x: Tensor) -> Tensor:
        whole: Any = GatherLast.apply(x, self.group, self.rank)
        return whole

    def loss(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        return vocab_loss(self.group, self.rank, logits_BSV, targets_BS)


class Entrance:
    """Lets a tensor enter once, however many divided matrices read it one after another."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        entered = self.links.enter(x)
        self._last = (x, entered)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the group; what entered before is let go."""
        self._last = None
        return self.links.leave(x)

    def forget(self, *_: object) -> None:
        """Let go of what entered."""
        self._last = None


def plan_of(module: nn.Module, target: str) -> dict[str, str]:
    """The module's `tp_plan` (Hugging Face's `_tp_plan`), checked; empty where it has none."""
    given: Any = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None) or {}
    if not isinstance(given, Mapping):
        raise InputError("tp_plan", type(given).__name__, f"of {target} is no mapping",
                         'write {"blocks.*.up": "colwise", ...}')  # fmt: skip
    plan = {str(name): str(ALIASES.get(style, style)) for name, style in given.items()}
    for name, style in plan.items():
        if style not in STYLES:
            raise InputError("tp_plan", f"{name}: {style}", f"no style that {target} can be cut by",
                             f"use {', '.join(STYLES)}")  # fmt: skip
    return plan


def matches(module: nn.Module, plan: Mapping[str, str], target: str) -> dict[str, str]:
    """Style by submodule, in the module's order; InputError for a name that is nobody's."""
    names = [name for name, _ in module.named_modules()]
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        shape = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
        mine = [name for name in names if shape.fullmatch(name)]
        if not mine:
            raise InputError("tp_plan", pattern, f"{target} has no such submodule",
                             "name linears and tables, * for any part of a name")  # fmt: skip
        for name in mine:
            _check_kind(module.get_submodule(name), name, style, target)
            found[name] = style
    return {name: found[name] for name in names if name in found}


def _check_kind(child: nn.Module, name: str, style: str, target: str) -> None:
    wanted = nn.Embedding if style == "embedding_rowwise" else nn.Linear
    if not isinstance(child, wanted):
        raise InputError("tp_plan", f"{name}: {style}",
                         f"is a {type(child).__name__} in {target}, not a {wanted.__name__}",
                         "name linears, and tables as embedding_rowwise")  # fmt: skip


def returns_divided_logits(plan: Mapping[str, str]) -> bool:
    """Whether the loss is computed on divided logits."""
    return "colwise_logits" in plan.values()


def divided_sizes(module: nn.Module, plan: Mapping[str, str], target: str) -> set[int]:
    """The sizes that a degree of tensor parallelism must divide."""
    return {
        module.get_submodule(name).get_parameter("weight").shape[1 if style == "rowwise" else 0]
        for name, style in matches(module, plan, target).items()
    }


def cut(module: nn.Module, plan: Mapping[str, str], links: Links, target: str) -> dict[str, int]:
    """Cut a module in place; the dimension along which each parameter was cut, by name."""
    styles = matches(module, plan, target)
    entrance = Entrance(links)
    made: dict[int, nn.Parameter] = {}
    dims: dict[int, int] = {}
    for name, style in styles.items():
        child = module.get_submodule(name)
        dim = 1 if style == "rowwise" else 0
        for key, parameter in list(child.named_parameters(recurse=False)):
            if key == "bias" and style == "rowwise":
                continue
            if id(parameter) not in made:  # a table may be tied to a head
                made[id(parameter)] = _part(parameter, dim, links)
                dims[id(made[id(parameter)])] = dim
            setattr(child, key, made[id(parameter)])
        if isinstance(child, nn.Embedding):
            _replace_forward(child, partial(_table, child, entrance))
        elif isinstance(child, nn.Linear):
            child.out_features, child.in_features = child.weight.shape
            _replace_forward(child, partial(_linear, child, style, entrance))
    module.register_forward_hook(entrance.forget)
    return {name: dims[id(p)] for name, p in module.named_parameters() if id(p) in dims}


def _part(parameter: nn.Parameter, dim: int, links: Links) -> nn.Parameter:
    part = parameter.detach().chunk(links.size, dim)[links.rank].clone()
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


def _linear(linear: nn.Linear, style: str, entrance: Entrance, x: Tensor) -> Tensor:
    if style == "rowwise":
        out = entrance.leave(F.linear(x, linear.weight))
        return out if linear.bias is None else out.add_(linear.bias)
    part = F.linear(entrance(x), linear.weight, linear.bias)
    return entrance.links.gather(part) if style == "colwise_gather_output" else part


def _table(table: nn.Embedding, entrance: Entrance, index: Tensor) -> Tensor:
    """Rows of a divided table: zeros where another rank has the row, summed."""
    rows = table.weight.shape[0]
    local = index - entrance.links.rank * rows
    elsewhere = (local < 0) | (local >= rows)
    found = F.embedding(local.masked_fill(elsewhere, 0), table.weight)
    return entrance.leave(found.masked_fill(elsewhere[..., None], 0.0))
