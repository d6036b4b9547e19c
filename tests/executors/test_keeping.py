"""What layers keep and make again is what the cost model's graph says, and changes no gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from forerun.costmodel import estimate
from forerun.costmodel.liveness import liveness
from forerun.costmodel.techniques.recompute import tensor_names
from forerun.errors import InputError
from forerun.executors import frames
from forerun.executors.decoder import Block
from forerun.executors.frames import Frame, Policy
from forerun.executors.marks import Marks
from forerun.executors.support import check_executed
from forerun.executors.techniques.recompute import layer_graph
from forerun.executors.torch_compat import storage_key
from forerun.model import Model

from .small import GPT, LLAMA, MODELS, SEQ, SEQS, counted, gradients, make_plan, make_trainer

pytestmark = pytest.mark.usefixtures("one_rank")

KEEP = ("x1", "o", "lse")
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "selective"},
    {"mode": "elementwise"},
    {"mode": "per_op"},
    {"mode": "tensors", "keep": []},
    {"mode": "tensors", "keep": list(KEEP)},
    {"mode": "tensors", "keep": ["mlp.in", "attention.in", "activation"]},
)


def block_of(model: Model, dtype: torch.dtype) -> tuple[Block, tuple[Tensor, ...]]:
    """A layer with its arguments, whose input needs a gradient."""
    from forerun.executors.rotary import rotary_table

    torch.manual_seed(0)
    block = Block(model, model.layers[0]).to(dtype)
    x = torch.randn(SEQS, SEQ, model.hidden, dtype=dtype, requires_grad=True)
    rotates = model.positions == "rope"
    table = rotary_table(torch.arange(SEQ), 16, 1e4).to(dtype) if rotates else None
    return block, (x, table)  # type: ignore[return-value]


def run_framed(block: Block, arguments: tuple[Any, ...], policy: Policy) -> tuple[Frame, Tensor]:
    frame = Frame(block, policy, Marks())
    block.run_by(frame.run)
    return frame, frame.forward(block.forward, *arguments)


def saved_bytes(block: nn.Module, arguments: tuple[Any, ...]) -> int:
    """What autograd saves of a layer by itself, parameters and constants left out."""
    ours = {storage_key(p.untyped_storage()) for p in block.parameters()}
    ours |= {storage_key(a.untyped_storage()) for a in arguments[1:] if a is not None}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        found[storage_key(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*arguments)
    return sum(size for key, size in found.items() if key not in ours)


@cache
def plain_gradients(model: Model, compute: str) -> dict[str, Tensor]:
    return gradients(make_plan(model, compute))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_saved_bytes_without_recompute_are_the_ledger(model: Model, compute: str) -> None:
    graph, sizes = layer_graph(make_plan(model, compute), 0)
    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    block, arguments = block_of(model, dtype)
    ledger = float(liveness(graph, sizes).saved[0])
    if model is not LLAMA and compute == "bf16":  # layer norms keep their statistics in 16 bits
        ledger -= 2 * 2 * 2 * SEQS * SEQ
    assert saved_bytes(block, arguments) == ledger


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_held_bytes_and_operators_run_again_are_the_graphs(
    model: Model, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, sizes = layer_graph(make_plan(model, more={"recompute": mode}), 0)
    block, arguments = block_of(model, torch.float32)
    again: list[str] = []
    run_again = Frame._run_again

    def noted(frame: Frame, name: str) -> None:
        again.append(name)
        run_again(frame, name)

    monkeypatch.setattr(frames.Frame, "_run_again", noted)
    frame, y = run_framed(block, arguments, Policy.of(graph, sizes))
    assert sum(entry.num_bytes for entry in frame.kept) == float(liveness(graph, sizes).saved[0])
    y.square().sum().backward()
    moves_nothing = {op.name for op in graph.operators if op.kind == "edge"}
    expected = {op.name for op in graph.operators if op.recomputed} - moves_nothing
    assert sorted(again) == sorted(expected), "each once, and no other"
    assert not any(e.handles for e in frame.kept)


@pytest.mark.parametrize(
    ("model", "mode"), [*((LLAMA, mode) for mode in MODES), (GPT, MODES[1]), (GPT, MODES[4])]
)
def test_gradients_are_bit_equal_and_the_peak_is_predicted(
    model: Model, mode: dict[str, Any]
) -> None:
    compute = "fp32" if mode.get("keep") != list(KEEP) else "bf16"
    plan = make_plan(model, compute, more={"recompute": mode})
    found = gradients(plan)
    for name, expected in plain_gradients(model, compute).items():
        assert torch.equal(found[name], expected), name
    trainer = make_trainer(plan)
    terms = estimate(plan).memory_terms_bytes
    predicted = sum(n for t, n in terms.items() if t not in ("fragmentation", "context"))
    assert predicted == pytest.approx(sum(counted(trainer, plan).peak().values()), rel=0.025)


@settings(max_examples=15)
@given(data=st.data(), model=st.sampled_from([LLAMA, GPT]))
def test_any_tensors_may_be_kept(data: st.DataObject, model: Model) -> None:
    """Held bytes are the ledger's and gradients bit-equal, whatever is named."""
    plain, sizes = layer_graph(make_plan(model), 0)
    names = data.draw(st.sets(st.sampled_from(sorted(tensor_names(plain)))))
    chosen = {"recompute": {"mode": "tensors", "keep": sorted(names)}}
    graph, sizes = layer_graph(make_plan(model, more=chosen), 0)
    block, arguments = block_of(model, torch.float32)
    block(*arguments).square().sum().backward()
    expected = [p.grad.clone() for p in (arguments[0], *block.parameters()) if p.grad is not None]
    block, arguments = block_of(model, torch.float32)
    frame, y = run_framed(block, arguments, Policy.of(graph, sizes))
    held = sum(entry.num_bytes for entry in frame.kept)
    assert held == float(liveness(graph, sizes).saved[0])
    y.square().sum().backward()
    found = [p.grad for p in (arguments[0], *block.parameters()) if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(entry.tensor is None for entry in frame.kept if entry.readers == 0)


def test_unknown_names_are_refused_with_near_ones() -> None:
    plan = make_plan(LLAMA, more={"recompute": {"mode": "tensors", "keep": ["activatoin"]}})
    with pytest.raises(InputError, match=r"recompute.keep=activatoin: .*did you mean activation"):
        check_executed(plan)
