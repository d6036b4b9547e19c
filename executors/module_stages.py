"""A user's module cut into pipeline stages, as its `pp_plan` says.

`pp_plan = (before, blocks, after)` names what the module consists of, in the order of its forward:

    before   a method or submodule: the module's inputs to hidden states (B, ...)
    blocks   a ModuleList or Sequential, each of which takes hidden states and returns them
    after    a method or submodule: hidden states to what the module returns; of a module that makes
             its own batches it takes the inputs behind them, `after(hidden, *inputs)`

so that `forward` is after(blocks(before(inputs))). A stage keeps the parameters that its part uses:
what `after` alone uses is on the last stage, a parameter that both ends use on both, the rest of
what is outside the blocks on the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..traced import Traced
from .user_module import Trainable, UserModule


class Ends(NamedTuple):
    """What `pp_plan` names."""

    before: str
    blocks: str
    after: str


def plan_of(module: nn.Module, target: str) -> Ends | None:
    """The module's `pp_plan`, checked; None where it has none."""
    given: Any = getattr(module, "pp_plan", None)
    if given is None:
        return None
    if not isinstance(given, Sequence) or len(given) != 3:
        raise InputError("pp_plan", given, f"of {target} is not (before, blocks, after)",
                         "name two methods and the ModuleList between them")  # fmt: skip
    ends = Ends(*map(str, given))
    for name in ends:
        if not callable(_named(module, name)):
            raise InputError("pp_plan", name, f"{target} has no such method or submodule",
                             "give names that the module has")  # fmt: skip
    if not isinstance(_named(module, ends.blocks), (nn.ModuleList, nn.Sequential)):
        raise InputError("pp_plan", ends.blocks, f"is no ModuleList or Sequential of {target}",
                         "name the list of blocks")  # fmt: skip
    return ends


def _named(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


class Composed(Trainable):
    """A module run as its `pp_plan` says it is: what is recorded to compare it with its forward."""

    def __init__(self, user: UserModule, ends: Ends) -> None:
        super().__init__(user)
        self.ends = ends
        self.hidden: tuple[int, ...] = ()
        """Shape of the last hidden states, without the batch."""

    def forward(self, *inputs: Tensor) -> Tensor:
        given = inputs[:1] if self.tokens else inputs
        x = _named(self.module, self.ends.before)(*given)
        for block in _named(self.module, self.ends.blocks):
            self._check(x, given[0].shape[0])
            x = block(x)
        self._check(x, given[0].shape[0])
        self.hidden = tuple(x.shape[1:])
        out = _named(self.module, self.ends.after)(x, *(() if self.tokens else inputs))
        return self.loss_of(out, *inputs) if self.tokens else self.scalar(out)

    def _check(self, x: Any, batch: int) -> None:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != batch:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            problem = f"blocks of {self.target} hand on {shape}"
            remedy = "hand on one tensor (B, ...)"
            raise InputError("pp_plan", self.ends.blocks, problem, remedy)


class Stage(Trainable):
    """One stage of a user's module; called by the pipeline with what its part takes.

    The first takes the module's inputs, the others hidden states; the last takes `targets`, or the
    inputs behind the hidden states, by name (`given_0`, ...).
    """

    def __init__(
        self, user: UserModule, ends: Ends, traced: Traced, layers: tuple[int, int]
    ) -> None:
        first, last = layers
        paths = traced.blocks[first : last + 1]
        super().__init__(user, paths)
        self.is_first, self.is_last = first == 0, last == len(traced.blocks) - 1
        self.ends = ends
        strip(user.module, traced, paths, self.is_first, self.is_last)

    def forward(self, *inputs: Tensor, targets: Tensor | None = None, **given: Tensor) -> Tensor:
        x = inputs[0]
        if self.is_first:
            x = _named(self.module, self.ends.before)(*inputs)
        for block in self.blocks.values():
            x = block(x)
        if not self.is_last:
            return x
        others = [given[f"given_{index}"] for index in range(len(given))]
        out = _named(self.module, self.ends.after)(x, *others)
        return self.scalar(out) if targets is None else self.loss_of(out, targets, targets)


def strip(
    module: nn.Module, traced: Traced, blocks: Sequence[str], is_first: bool, is_last: bool
) -> None:
    """Drop what a stage does not use, in place; names of what stays do not change."""
    for path in traced.blocks:
        if path not in blocks:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, nn.Identity())
    of_last = {weight.name for op in traced.suffix for weight in op.weights}
    of_both = {weight.name for weight in traced.shared}

    def stays(name: str) -> bool:
        if any(name.startswith(f"{path}.") for path in blocks):
            return True
        return (is_last and name in of_last | of_both) or (is_first and name not in of_last)

    first_name: dict[int, str] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if not stays(first_name.setdefault(id(parameter), name)):
            parent, _, key = name.rpartition(".")
            module.get_submodule(parent)._parameters[key] = None
