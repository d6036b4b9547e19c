"""Expert offload: the moments of the experts' optimiser wait on the host between updates.

    host tier   pinned memory beside a CUDA device; on a CPU, whose memory is the device's, a file
                that is mapped, so that the whole way is gone and measured
    update      piece by piece: moments come in, AdamW runs on the piece, moments go back

On the device then stand no moments of experts but those of one piece. Copies run in the stream of
the update and are not hidden. The numbers are those of AdamW without offload, bit by bit.

Source: Ren et al. 2021 (ZeRO-Offload) for states on the host; Kim et al. 2021 (Z-code M3) for doing
so with experts. Here the update stays on the device, where its rate is known.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...costmodel.techniques.expert_offload import PIECE_ELEMENTS
from ...errors import RunFailed
from ...units import format_bytes
from ..optimizer import ADAMW
from ..torch_compat import DTensor, adamw_update

MOMENTS = ("exp_avg", "exp_avg_sq")


class Parked(Protocol):
    """A flat fp32 array on the host."""

    def load(self, start: int, out: Tensor) -> None:
        """Copy as many elements as `out` has, from `start` on, to it."""

    def store(self, start: int, values: Tensor) -> None:
        """Copy values to the places from `start` on."""


class PinnedArray:
    """Page-locked memory, which a GPU copies to and from by itself."""

    def __init__(self, num_elements: int) -> None:
        self.values = torch.zeros(num_elements, pin_memory=True)

    def load(self, start: int, out: Tensor) -> None:
        out.copy_(self.values[start : start + out.numel()], non_blocking=True)

    def store(self, start: int, values: Tensor) -> None:
        self.values[start : start + values.numel()].copy_(values, non_blocking=True)


class MappedArray:
    """A file that is mapped into memory; it has no name, so that nothing is left behind."""

    def __init__(self, num_elements: int) -> None:
        handle, path = tempfile.mkstemp(prefix="forerun-experts-")
        try:
            os.ftruncate(handle, 4 * num_elements)
            self.values = np.memmap(path, dtype=np.float32, mode="r+", shape=(num_elements,))
        except OSError as error:
            raise RunFailed(f"disk={tempfile.gettempdir()}: cannot hold "
                            f"{format_bytes(4 * num_elements)} of moments ({error.strerror}); "
                            "free some space or set TMPDIR") from error  # fmt: skip
        finally:
            os.close(handle)
            os.unlink(path)

    def load(self, start: int, out: Tensor) -> None:
        np.copyto(out.numpy(), self.values[start : start + out.numel()])

    def store(self, start: int, values: Tensor) -> None:
        np.copyto(self.values[start : start + values.numel()], values.numpy())


class HostTier:
    """The host memory of one rank, within a budget."""

    def __init__(self, device: torch.device, budget_bytes: int | None) -> None:
        self.device, self.budget_bytes, self.used_bytes = device, budget_bytes, 0

    def allocate(self, num_elements: int) -> Parked:
        """An array of zeros; raises RunFailed beyond the budget."""
        self.used_bytes += 4 * num_elements
        if self.budget_bytes is not None and self.used_bytes > self.budget_bytes:
            raise RunFailed(f"host_bytes={self.budget_bytes}: the experts' moments take "
                            f"{self.used_bytes} bytes and more on this rank; raise the budget, or "
                            "raise ep or dp_shard")  # fmt: skip
        array = PinnedArray if self.device.type == "cuda" else MappedArray
        return array(num_elements)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments of some parameters, `hosted`, lie in a host tier."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        hosted: Iterable[nn.Parameter],
        learning_rate: float,
        tier: HostTier,
    ) -> None:
        super().__init__(parameters, lr=learning_rate, fused=True, **ADAMW)
        self.hosted = list(hosted)
        self.parked = [
            {name: tier.allocate(_flat(p).numel()) for name in MOMENTS} for p in self.hosted
        ]
        self.num_updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters that have gradients."""
        gradients = [p.grad for p in self.hosted]
        for p in self.hosted:
            p.grad = None
        result = super().step(closure)
        for p, gradient, parked in zip(self.hosted, gradients, self.parked, strict=True):
            p.grad = gradient
            if gradient is not None:
                self._update(_flat(p), _flat(gradient), parked)
        self.num_updates += 1
        return result

    def _update(self, values: Tensor, gradient: Tensor, parked: dict[str, Parked]) -> None:
        """One parameter, piece by piece; `values` and `gradient` are flat views."""
        size = min(PIECE_ELEMENTS, values.numel())
        buffers = {name: torch.empty(size, device=values.device) for name in MOMENTS}
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for start in range(0, values.numel(), PIECE_ELEMENTS):
            end = min(start + PIECE_ELEMENTS, values.numel())
            moments = {name: buffer[: end - start] for name, buffer in buffers.items()}
            for name, moment in moments.items():
                parked[name].load(start, moment)
            adamw_update(
                [values[start:end]],
                [gradient[start:end]],
                [moments["exp_avg"]],
                [moments["exp_avg_sq"]],
                [],
                [torch.tensor(float(self.num_updates), device=values.device)],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for name, moment in moments.items():
                parked[name].store(start, moment)
        if values.is_cuda:  # the buffers are freed while copies may still read them
            torch.cuda.current_stream(values.device).synchronize()

    def state_dict(self) -> dict[str, Any]:
        """The states of all parameters, those of hosted ones fetched."""
        state = super().state_dict()
        if not self.num_updates:
            return state
        every = [p for group in self.param_groups for p in group["params"]]
        index_of = {id(p): index for index, p in enumerate(every)}
        for p, parked in zip(self.hosted, self.parked, strict=True):
            own: dict[str, Any] = {"step": torch.tensor(float(self.num_updates))}
            for name in MOMENTS:
                flat = torch.empty(_flat(p).numel(), device=_flat(p).device)
                parked[name].load(0, flat)
                own[name] = _like(flat, p)
            state["state"][index_of[id(p)]] = own
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take states over, those of hosted parameters into the host tier."""
        every = [p for group in self.param_groups for p in group["params"]]
        index_of = {id(p): index for index, p in enumerate(every)}
        states = dict(state_dict["state"])
        for p, parked in zip(self.hosted, self.parked, strict=True):
            own = states.pop(index_of[id(p)], None)
            if own is None:
                continue
            self.num_updates = int(own["step"])
            for name in MOMENTS:
                parked[name].store(0, _flat(own[name]).to(_flat(p).device))
        super().load_state_dict({**state_dict, "state": states})


def _flat(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank stores, as one row that shares its memory."""
    local = tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    return local.view(-1)


def _like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """A flat local tensor in the form of a parameter."""
    if not isinstance(parameter, DTensor):
        return flat.view(parameter.shape)
    local = flat.view(parameter.to_local().shape)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements)
