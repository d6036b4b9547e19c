"""AdamW with moments in 8-bit floats of expanded range, over plain parameters and FSDP's shards.

The arithmetic is `kernels/adamw_fp8.py`. State of a parameter whose rows (all dimensions but the
first) have 128 elements or more:

    step                          0-dim, on the CPU
    exp_avg, exp_avg_sq           codes, uint8, in the parameter's shape
    exp_avg_groups, exp_avg_sq_groups    fp32, (rows, groups, 3)

Of others (norms, biases, narrow matrices) exp_avg and exp_avg_sq are fp32. Of a sharded parameter
all of them are sharded likewise: groups lie within rows, so that a checkpoint may be loaded into
another number of shards, and codes do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import adamw_fp8 as kernel
from .torch_compat import DTensor


class AdamWFp8(torch.optim.Optimizer):
    """Decoupled weight decay as in `torch.optim.AdamW`."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._skipped: dict[torch.device, Tensor] = {}

    @property
    def num_skipped(self) -> int:
        """Groups left as they were because their gradient was not finite, over all steps."""
        return sum(int(count) for count in self._skipped.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over every parameter with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_initial(parameter))
        state["step"] += 1
        p, g = _local(parameter), _local(gradient)
        b1, b2 = group["betas"]
        settings = {
            "learning_rate": float(group["lr"]),
            "betas": (b1, b2),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "steps": int(state["step"]),
            "skipped": self._counter(p.device),
        }
        if "exp_avg_groups" not in state:
            _plain_step(p, g, _local(state["exp_avg"]), _local(state["exp_avg_sq"]), **settings)
            return
        first, second = (
            kernel.Moment(_local(state[name]), _local(state[f"{name}_groups"]))
            for name in ("exp_avg", "exp_avg_sq")
        )
        kernel.step(p, g, first, second, **settings)

    def _counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._skipped[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States exactly as they were saved: torch would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if name == "step" else parameter.device
                    self.state[parameter][name] = value.detach().clone().to(device)


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    rows = parameter.shape[0] if parameter.dim() > 1 else 0
    return rows > 0 and parameter.numel() // rows >= kernel.GROUP


def _initial(parameter: Tensor) -> dict[str, Tensor]:
    """Moments of zeros."""
    local = _local(parameter)
    state: dict[str, Tensor] = {"step": torch.zeros(())}
    for name in ("exp_avg", "exp_avg_sq"):
        if not is_packed(parameter):
            zeros = torch.zeros_like(local, dtype=torch.float32)
            state[name] = _like(parameter, zeros, tuple(parameter.shape))
            continue
        rows, columns = parameter.shape[0], parameter.numel() // parameter.shape[0]
        per_row = kernel.num_groups(columns)
        groups = torch.empty(local.shape[0], per_row, 3, device=local.device)
        groups[:] = kernel.pack(torch.zeros(1, 1))[1].to(local.device)
        codes = torch.zeros_like(local, dtype=torch.uint8)
        state[name] = _like(parameter, codes, tuple(parameter.shape))
        state[f"{name}_groups"] = _like(parameter, groups, (rows, per_row, 3))
    return state


def _like(parameter: Tensor, local: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A local tensor, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=torch.Size(shape), stride=stride,
    )  # fmt: skip


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, learning_rate: float,
    betas: tuple[float, float], eps: float, weight_decay: float, steps: int, skipped: Tensor,
) -> None:  # fmt: skip
    """The step of `kernels/adamw_fp8.py` on fp32 moments; the tensor is one group."""
    if p.numel() == 0:
        return
    b1, b2 = betas
    g = g.float()
    whole = g.mul(0.0).sum() == 0
    skipped += (~whole).int()
    new_m = m.mul(b1).add_(g, alpha=1 - b1)
    new_v = v.mul(b2).addcmul_(g, g, value=1 - b2)
    denominator = new_v.div(1 - b2**steps).sqrt_().add_(eps)
    rate = learning_rate / (1 - b1**steps)
    new_p = (
        p.float().mul(1 - learning_rate * weight_decay).addcdiv_(new_m, denominator, value=-rate)
    )
    for there, value in ((p, new_p), (m, new_m), (v, new_v)):
        there.copy_(torch.where(whole, value.to(there.dtype), there))
