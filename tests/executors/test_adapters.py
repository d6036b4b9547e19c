"""Adapters on frozen weights: what trains, what autograd holds, what is kept at rest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from forerun.costmodel import estimate
from forerun.errors import InputError
from forerun.executors.decoder import Block
from forerun.executors.linear import ADAPTER_SCALE, Linear
from forerun.executors.techniques.lora import is_adapter, linears_of
from forerun.executors.trainer import Trainer
from forerun.kernels import dequantize
from forerun.mesh import Mesh
from forerun.model import Model
from forerun.plan import Plan

from .plans import MODELS as PLAIN
from .plans import plan_of, tokens, train, trainer_of
from .test_storage import counted_peak, ledger_bytes, saved_bytes

pytestmark = pytest.mark.usefixtures("one_rank")


def with_width(model: Model, ffn_hidden: int) -> Model:
    layers = tuple(msgspec.structs.replace(x, ffn_hidden=ffn_hidden) for x in model.layers)
    return msgspec.structs.replace(model, layers=layers)


MODELS = {**PLAIN, "llama": with_width(PLAIN["llama"], 384)}
"""Widths in whole blocks of nf4, but those of gpt."""
CASES = [
    (model, base)
    for model in MODELS
    for base in (None, "nf4", "gptq4_g32", "gptq3_g32")
    if (model, base) != ("gpt", "nf4")
]


def adapted(model: str, base: str | None = None, compute: str = "fp32", **more: Any) -> Plan:
    lora = {"rank": 8, **({} if base is None else {"base": base}), **more.pop("lora", {})}
    return plan_of(MODELS[model], {"compute": compute}, lora=lora, **more)


@pytest.mark.parametrize(("model", "base"), CASES)
def test_saved_bytes_are_the_ledgers(model: str, base: str | None) -> None:
    plan = adapted(model, base)
    assert saved_bytes(trainer_of(plan)) == pytest.approx(ledger_bytes(plan), rel=5e-3)


AT_REST = [
    pytest.param(model, base, compute, marks=() if quick else pytest.mark.slow)
    for model, base in CASES
    for compute in ("fp32", "bf16")
    for quick in [(compute == "bf16") == (model == "llama")]
]


@pytest.mark.parametrize(("model", "base", "compute"), AT_REST)
def test_bytes_at_rest_are_the_predicted_ones(model: str, base: str | None, compute: str) -> None:
    """Parameters and optimiser states, to the byte but for 4 per tensor of steps counted."""
    plan = adapted(model, base, compute)
    trainer = trainer_of(plan)
    train(trainer, 1)
    (piece,) = trainer.pieces
    found = sum(local(p).untyped_storage().nbytes() for p in piece.parameters())
    states = [v for s in trainer.optimizer.state.values() for v in s.values() if v.dim() > 0]
    terms = estimate(plan).memory_terms_bytes
    assert terms["parameters"] == found
    assert terms["optimizer"] == sum(local(v).untyped_storage().nbytes() for v in states)
    assert all(is_adapter(n) for n, p in piece.named_parameters() if p.requires_grad)


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


@pytest.mark.parametrize("base", [None, "nf4", "gptq4_g32"])
def test_predicted_peak_is_the_counted_one(
    base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored matrices are converted a few rows at a time, which of so small ones are many."""
    monkeypatch.setattr(dequantize, "CHUNK_ELEMENTS", 2048)
    plan = adapted("llama", base, seqs=16)
    terms = estimate(plan).memory_terms_bytes
    predicted = sum(n for t, n in terms.items() if t not in ("fragmentation", "context"))
    assert predicted == pytest.approx(counted_peak(plan), rel=0.02)


def effective(linear: Linear) -> Tensor:
    """The matrix that a linear with an adapter multiplies with."""
    weight = linear.weight if linear.stored is None else linear.stored.weight(torch.float32)
    if linear.lora_a is None or linear.lora_b is None:
        return weight
    return weight + ADAPTER_SCALE * linear.lora_b.weight @ linear.lora_a.weight


def block_of(trainer: Trainer, index: str) -> Block:
    block = trainer.pieces[0].blocks[index]
    assert isinstance(block, Block)
    return block


def dense_like(trainer: Trainer, model: str) -> Trainer:
    """A trainer of all weights with those that adapters have come to."""
    dense = trainer_of(plan_of(MODELS[model]))
    with torch.no_grad():
        for name, parameter in dense.pieces[0].named_parameters():
            there = dict(trainer.pieces[0].named_parameters())
            if name in there:
                parameter.copy_(there[name])
        for index in dense.pieces[0].blocks:
            pairs = (linears_of(block_of(x, index)) for x in (dense, trainer))
            plain, with_adapters = pairs
            for name, linear in plain.items():
                linear.weight.copy_(effective(with_adapters[name]))
    return dense


@pytest.mark.parametrize(("model", "base"), [("llama", None), ("gpt", None), ("llama", "nf4"),
                                             ("gemma", "gptq3_g32")])  # fmt: skip
def test_gradients_are_those_of_the_weights_seen_through_the_adapter(
    model: str, base: str | None
) -> None:
    """Of W + s B A they are s dW A^T of B and s B^T dW of A; and merged, the loss is the same."""
    trainer = trainer_of(adapted(model, base))
    train(trainer, 3)
    dense = dense_like(trainer, model)
    losses = [float(x.forward_backward(tokens(7))) for x in (trainer, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    of_weights = dense.named_gradients()
    for index in trainer.pieces[0].blocks:
        for name, linear in linears_of(block_of(trainer, index)).items():
            gradient = of_weights[f"blocks.{index}.{name}.weight"]
            assert linear.lora_a is not None and linear.lora_b is not None
            a, b = linear.lora_a.weight, linear.lora_b.weight
            for found, expected in (
                (b.grad, ADAPTER_SCALE * gradient @ a.detach().T),
                (a.grad, ADAPTER_SCALE * b.detach().T @ gradient),
            ):
                assert found is not None
                assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-9


def test_adapters_begin_as_nothing_and_learn() -> None:
    plain, trainer = trainer_of(plan_of(MODELS["llama"])), trainer_of(adapted("llama"))
    first = float(plain.forward_backward(tokens(0)))
    before = {n: p.clone() for n, p in trainer.pieces[0].named_parameters() if not p.requires_grad}
    losses = train(trainer, 30)
    assert losses[0] == pytest.approx(first, rel=1e-6)
    assert losses[-1] < losses[0] - 0.02
    after = dict(trainer.pieces[0].named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


KEEP = {"mode": "tensors", "keep": ["x1", "o", "lse", "wq.lora_a.out"]}


MORE: list[dict[str, Any]] = [
    {"recompute": {"mode": "selective"}},
    {"recompute": {"mode": "full"}},
    {"recompute": {"mode": "elementwise"}},
    {"recompute": {"mode": "per_op"}},
    {"recompute": KEEP},
    {"offload": {"activations": 0.5}},
    {"offload": {"activations": 0.5, "rest": "recompute"}},
    {"offload": {"states": "optimizer"}},
    {"lora": {"targets": "qv"}},
]
KEPT = [
    pytest.param(base, more, marks=() if quick else pytest.mark.slow, id=f"{base}-{more}")
    for index, more in enumerate(MORE)
    for base in (None, "nf4")
    for quick in [(index % 2 == 0) == (base is None)]
]


@pytest.mark.parametrize(("base", "more"), KEPT)
def test_what_is_kept_or_moved_changes_no_gradient(base: str | None, more: dict[str, Any]) -> None:
    same: dict[str, Any] = {"lora": more["lora"]} if "lora" in more else {}
    exact = trainer_of(adapted("llama", base, **same))
    trainer = trainer_of(plan := adapted("llama", base, **more))
    losses = [float(x.forward_backward(tokens(0))) for x in (exact, trainer)]
    assert losses[0] == losses[1]
    gradients = exact.named_gradients()
    for name, gradient in trainer.named_gradients().items():
        assert torch.equal(gradient, gradients[name]), name
    if "states" not in more.get("offload", {}):
        assert saved_bytes(trainer) == pytest.approx(ledger_bytes(plan), rel=5e-3)


@pytest.mark.slow
def test_compiled_layers_have_adapters() -> None:
    losses = [
        train(trainer_of(adapted("llama", runtime={"mode": mode})), 3)
        for mode in ("eager", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("lora", "more", "message"),
    [
        ({"rank": 0}, {}, r"^lora.rank=0: not a positive number"),
        ({"rank": 65}, {}, r"^lora.rank=65: wk of layer 0 is 64 x 128, of rank 64 at most"),
        ({"rank": 8, "base": "gptq5_g128"}, {}, r"^lora.base=gptq5_g128: unknown storage"),
        ({"rank": 8, "targets": "k"}, {}, r"^lora.targets=k: unknown choice"),
        ({"rank": 8}, {"precision": {"compute": "fp8"}}, r"^precision.compute=fp8: layers with"),
        ({"rank": 8}, {"offload": {"states": "parameters"}}, r"^offload=parameters"),
        ({"rank": 8, "base": "nf4"}, {"runtime": {"mode": "compiled"}}, r"^runtime=compiled"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    lora: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trainer_of(plan_of(MODELS["llama"], lora=lora, **more))


def test_blocks_that_do_not_divide_a_matrix_are_refused_with_its_shape() -> None:
    with pytest.raises(InputError, match=r"wq of layer 0 is 160 x 160, and 64 does not divide 160"):
        trainer_of(adapted("gpt", "nf4"))
    plan = adapted("llama", "nf4")
    phase = msgspec.structs.replace(plan.phase, mesh=Mesh(tp=4))
    with pytest.raises(InputError, match=r"wo of layer 0 is 128 x 32 at tp=4"):
        from forerun.executors.adapters import check_adapters

        check_adapters(msgspec.structs.replace(plan, phases=(phase,)))


def test_layers_without_adapters_beside_others_are_refused() -> None:
    plan = adapted("llama")
    (setting,) = plan.phase.settings
    rest = {name: value for name, value in setting.techniques.items() if name != "lora"}
    settings = (
        msgspec.structs.replace(setting, layers=(0, 0)),
        msgspec.structs.replace(setting, layers=(1, 1), techniques=rest),
    )
    phase = msgspec.structs.replace(plan.phase, settings=settings)
    with pytest.raises(InputError, match=r"layer 1: has no adapters, and others have"):
        trainer_of(msgspec.structs.replace(plan, phases=(phase,)))
