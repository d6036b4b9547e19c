"""torch's pipeline stages and their runtime, with private names: the orders that a plan plays,
marks around what ranks wait for, backwards in two halves; written for torch 2.11 to 2.13."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action,
    _batch_p2p,
    _ComputationType,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

from ..orders import Orders, action_text
from .marks import Marks, Message
from .split_backward import Later

if TYPE_CHECKING:
    from .data_parallel import Replicas


class ObservedStage(PipelineStage):
    """A pipeline stage that marks its work and holds receive buffers only while they are in use.

    Torch allocates the receive buffers of all micro-batches before the first one and keeps them;
    here a buffer is made when its receive is posted and let go when its chunk has been computed, so
    that a schedule keeps as many inputs as it has micro-batches in flight.
    """

    marks: Marks
    later: Later | None = None
    """Where a backward is split: products whose weights wait for their gradients."""
    replicas: Replicas | None = None
    """Who averages gradients over replicas, where FSDP does not."""
    table_stage: ObservedStage | None = None
    """The stage of the same rank whose embedding this one's head uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent_forward: dict[int, list[Any]] = {}
        """Works of sent activations by micro-batch, until the gradient is back."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        _release(self.args_recv_info.values())
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        _release(self.grad_recv_info.values())
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device, needs_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device, needs_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        key = f"F{self.stage_index}"
        with self.marks.chunk("forward", key, f"{key}.{fwd_chunk_id}"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release([self.args_recv_info[fwd_chunk_id]])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        whole = kwargs.get("full_backward", True)
        _wait_batch_p2p(self.sent_forward.pop(bwd_chunk_id, []))
        if self.later is not None:
            self.later.putting_off = not whole
        key = f"{'B' if whole else 'I'}{self.stage_index}"
        with self.marks.chunk("backward", key, f"B{self.stage_index}.{bwd_chunk_id}"):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            if self.table_stage is not None:
                _accumulate(self.table_stage.submod)
        _release([self.grad_recv_info[bwd_chunk_id]])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.marks.chunk("backward", f"W{self.stage_index}"):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            _accumulate(self.submod)
            if self.table_stage is not None:
                _accumulate(self.table_stage.submod)

    def perform_reduce_grad(self, *args: Any, **kwargs: Any) -> None:
        with self.marks.mark("backward"):
            super().perform_reduce_grad(*args, **kwargs)
            if self.replicas is not None:
                self.replicas.start()


def _accumulate(module: nn.Module) -> None:
    """Add gradients of FSDP's 16-bit copies, which came without its hooks, to those in fp32."""
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        state: Any = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one or none
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group is not None else ():
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def _release(groups: Any) -> None:
    """Let go of receive buffers, after noting their form; an empty tensor takes their place."""
    for infos in groups:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.numel() > 0:
                info.form = (buffer.shape, buffer.dtype)
                info.buffer = buffer.new_empty(0)


def _allocate(infos: Any, device: torch.device, *, needs_grad: bool) -> None:
    """Make receive buffers again; received activations need a gradient."""
    for info in infos:
        if hasattr(info, "form") and info.buffer.numel() == 0:
            shape, dtype = info.form
            buffer = torch.empty(shape, dtype=dtype, device=device)
            info.buffer = buffer.requires_grad_(needs_grad and dtype.is_floating_point)


class Runtime(_PipelineScheduleRuntime):
    """Torch's runtime for the orders of a plan, which holds what it sends no longer than needed.

    Torch keeps every message until the end of the step. Here a sent gradient is waited for when the
    same stage sends its next but one (the rank before has asked for it by then), a sent activation
    when its gradient is back.
    """

    def __init__(
        self,
        stages: list[ObservedStage],
        num_microbatches: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        orders: Orders,
    ) -> None:
        super().__init__(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
        self.own = {stage.stage_index: stage for stage in stages}
        self.sent_backward: dict[int, deque[list[Any]]] = {}
        """Works of gradients that were sent and not waited for, oldest first, by stage."""
        actions = {
            rank: [_Action.from_str(action_text(action)) for action in order]
            for rank, order in enumerate(orders)
        }
        self._prepare_schedule_with_comms(actions)
        own_order = gathered_once(self.pipeline_order_with_comms[self.rank])
        if any(stage.table_stage is not None for stage in stages):
            own_order = reduced_last(own_order, 0)
        self.pipeline_order_with_comms[self.rank] = own_order
        for kind, function in (
            ("SEND_F", self._send),
            ("SEND_B", self._send),
            ("RECV_F", self._receive),
            ("RECV_B", self._receive),
        ):
            self._comp_type_to_function_map[_ComputationType[kind]] = function

    def _send(self, action: Any, _: Any) -> None:
        stage, micro = self.own[action.stage_index], action.microbatch_index
        if action.computation_type.name == "SEND_F":
            stage.sent_forward[micro] = _batch_p2p(stage.get_fwd_send_ops(micro))
            return
        waiting = self.sent_backward.setdefault(action.stage_index, deque())
        waiting.append(_batch_p2p(stage.get_bwd_send_ops(micro)))
        if len(waiting) > GRADIENTS_ON_WIRE:
            _wait_batch_p2p(waiting.popleft())

    def _receive(self, action: Any, _: Any) -> None:
        stage, micro = self.own[action.stage_index], action.microbatch_index
        posted: Any
        if action.computation_type.name == "RECV_F":
            posted, operations = self.fwd_recv_ops, stage.get_fwd_recv_ops(micro)
            after = f"F{action.stage_index - 1}.{micro}"
        else:
            posted, operations = self.bwd_recv_ops, stage.get_bwd_recv_ops(micro)
            after = f"B{action.stage_index + 1}.{micro}"
        posted[action.stage_index, micro] = [Message(stage.marks, _batch_p2p(operations), after)]

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> None:
        self.loss_order: list[int] = []
        super()._step_microbatches(*args, **kwargs)
        for waiting in self.sent_backward.values():
            while waiting:
                _wait_batch_p2p(waiting.popleft())

    def _maybe_compute_loss(
        self, stage: Any, output: Any, targets: Any, micro: int, *more: Any
    ) -> None:
        before = len(self._internal_losses)
        super()._maybe_compute_loss(stage, output, targets, micro, *more)
        if len(self._internal_losses) > before:
            self.loss_order.append(micro)

    def _maybe_get_loss(self, stage: Any, micro: int) -> Any:
        """A loss for its backward; what is kept of it holds no graph, whose leaves are inputs.

        Torch takes the last stage's forwards to be in the order of micro-batches.
        """
        if not stage.is_last:
            return None
        place = self.loss_order.index(micro)
        loss: Any = super()._maybe_get_loss(stage, place)
        self._internal_losses[place] = loss.detach()
        return loss


GRADIENTS_ON_WIRE = 1
"""Sent gradients that a stage holds besides the newest."""


def reduced_last(order: list[Any], stage: int) -> list[Any]:
    """An order in which a stage's gradients are reduced, and its parameters freed, at the end: when
    another stage of the rank uses one of its parameters."""
    closing = ("REDUCE_GRAD", "RESHARD")

    def closes(action: Any) -> bool:
        return action.stage_index == stage and action.computation_type.name in closing

    return [a for a in order if not closes(a)] + [a for a in order if closes(a)]


def gathered_once(order: list[Any]) -> list[Any]:
    """An order of actions in which each stage is gathered at its first use and freed at its last.

    Torch keeps three stages gathered at a time and would gather again with more chunks per rank.
    """
    kept = _first_of_each(order, "UNSHARD")
    return _first_of_each(kept[::-1], "RESHARD")[::-1]


def _first_of_each(order: list[Any], kind: str) -> list[Any]:
    seen: set[int] = set()
    kept: list[Any] = []
    for action in order:
        if action.computation_type.name == kind:
            if action.stage_index in seen:
                continue
            seen.add(action.stage_index)
        kept.append(action)
    return kept
