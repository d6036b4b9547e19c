"""A user's module by the name of the function that makes it: `package.module:function`.

The function returns an `nn.Module`, or a pair (module, make_batch). Without `make_batch` the module
takes tokens (B, S) int64 and returns logits (B, S, V), which are trained on the next token, or a
scalar loss of its own. With it, `make_batch(batch, seq_tokens)` returns a tuple of inputs, and
`module(*inputs)` a scalar loss.
"""

from __future__ import annotations

import difflib
import importlib
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import huggingface

if TYPE_CHECKING:
    from .module_cuts import Links

Inputs = tuple[Tensor, ...]
MakeBatch = Callable[[int, int], Inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserModule:
    """What a user's function returned."""

    target: str
    module: nn.Module
    make_batch: MakeBatch | None

    def inputs(self, batch: int, seq_tokens: int) -> Inputs:
        """A batch of the form that training takes; of tokens, inputs and targets."""
        if self.make_batch is None:
            tokens = torch.zeros((batch, seq_tokens + 1), dtype=torch.int64)
            return tokens[:, :-1], tokens[:, 1:]
        with redirect_stdout(sys.stderr):
            made = self.make_batch(batch, seq_tokens)
        if isinstance(made, Tensor):
            made = (made,)
        if not isinstance(made, tuple) or not all(isinstance(x, Tensor) for x in made):
            raise InputError("model", self.target, "make_batch returns no tuple of tensors",
                             "return (input, ...), as module(*inputs) takes them")  # fmt: skip
        for x in made:
            if x.dim() == 0 or x.shape[0] != batch:
                raise InputError("model", self.target,
                                 f"make_batch({batch}, ...) returns a tensor {list(x.shape)}",
                                 "give every tensor the batch as its first axis")  # fmt: skip
        return made

    def samples(self, seeds: list[int], seq_tokens: int) -> Inputs:
        """A batch of samples, each made by itself after seeding: none depends on its neighbours."""
        made: list[Inputs] = []
        for seed in seeds:
            seed_everything(seed)
            made.append(self.inputs(1, seq_tokens))
        return tuple(torch.cat(column) for column in zip(*made, strict=True))


class Trainable(nn.Module):
    """A user's module whose call returns the loss."""

    def __init__(self, user: UserModule, blocks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.module = user.module
        self.target, self.tokens = user.target, user.make_batch is None
        self.is_first = self.is_last = True
        self.blocks = {path: user.module.get_submodule(path) for path in blocks}
        """The layers by path, in order; they stay where they are in `module`."""

        self.links: Links | None = None
        """The tensor-parallel group, where the module returns divided logits."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.tokens:
            return self.scalar(self.module(*inputs))
        return self.loss_of(self.module(inputs[0]), *inputs)

    def loss_of(self, out: Any, x_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """The loss of what a module that takes tokens returned for (B, S) of them."""
        if isinstance(out, Tensor) and out.dim() == 3 and out.shape[:2] == x_BS.shape:
            if self.links is not None:
                return self.links.loss(out, targets_BS)
            return F.cross_entropy(out.flatten(0, 1).float(), targets_BS.flatten())
        return self.scalar(out)

    def scalar(self, out: Any) -> Tensor:
        """`out`, if it is a loss."""
        if isinstance(out, Tensor) and out.dim() == 0:
            return out
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        wanted = "a scalar loss or logits (B, S, V)" if self.tokens else "a scalar loss"
        raise InputError("model", self.target, f"forward returns {shape}", f"return {wanted}")


def seed_everything(seed: int) -> None:
    """Seed every generator that a user's function may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def load(target: str) -> UserModule:
    """Import the function `target` names and call it; what it prints goes to stderr.

    Raises InputError where it cannot be imported, is no function, fails or returns no module.
    """
    function = find(target)
    try:
        with redirect_stdout(sys.stderr):
            made = function()
    except Exception as error:
        raise _failed(
            target,
            "the function fails",
            error,
            "make it run without arguments, on tensors without data",
        ) from (error)
    module, make_batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise InputError("model", target, f"returns {type(module).__name__}",
                         "return an nn.Module, or (module, make_batch)")  # fmt: skip
    if make_batch is not None and not callable(make_batch):
        problem = f"make_batch is {type(make_batch).__name__}"
        remedy = "return (module, make_batch) with make_batch(batch, seq_tokens)"
        raise InputError("model", target, problem, remedy)
    return UserModule(target=target, module=module, make_batch=cast("MakeBatch | None", make_batch))


def find(target: str) -> Callable[[], Any]:
    """The function that `target` names, imported; of `hf:PATH` one that builds that model."""
    if huggingface.is_huggingface(target):
        return huggingface.maker(target)
    name, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _failed(target, "the module fails", error, "install what it needs") from error
        raise InputError("model", target, f"no module {error.name} in {here} or where Python looks",
                         "run from the folder that holds it") from error  # fmt: skip
    except Exception as error:
        raise _failed(target, "the module fails", error, "make it importable") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "name a function of it"
            raise InputError("model", target, f"{name} has no {attribute}", hint)
        found = getattr(found, part)
    if not callable(found):
        raise InputError("model", target, f"{attribute} is {type(found).__name__}",
                         "name a function that returns an nn.Module")  # fmt: skip
    return found


def _failed(target: str, what: str, error: Exception, remedy: str) -> InputError:
    text = " ".join(str(error).split())[:200]
    return InputError("model", target, f"{what} ({type(error).__name__}: {text})", remedy)
