"""Linears on 8-bit operands: the emulated matmul, gradients, shared casts, torchao beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forerun.executors import fp8_linear
from forerun.executors.decoder import Block
from forerun.executors.fp8_linear import Operands, product
from forerun.executors.torch_compat import scaled_matmul
from forerun.kernels.fp8_cast import E4M3, E5M2, Cast, cast, unpack_tensor

from .plans import LLAMA, plan_of, tokens, train, trainer_of

COAT: dict[str, Any] = {"compute": "fp8", "recipe": "coat"}
STORED: dict[str, Any] = {"compute": "fp8", "recipe": "coat", "activations": "fp8"}


def values(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of a matrix in 8 bits with one scale."""
    found = cast(x, dtype)
    assert found.codes_MK is not None
    return unpack_tensor(found.codes_MK, found.scale, torch.float32)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_emulation_is_torchs_scaled_matmul(out: torch.dtype) -> None:
    """On the CPU torch has a slow, exact one: the same up to the order of a sum."""
    torch.manual_seed(0)
    a, b = cast(torch.randn(32, 64), E4M3), cast(torch.randn(48, 64), E4M3)
    assert a.codes_MK is not None and b.codes_MK is not None
    one = torch.ones(())
    names: Any = torch
    expected = names._scaled_mm(
        a.codes_MK, b.codes_MK.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=out
    )
    found = scaled_matmul(a.codes_MK, b.codes_MK, a.scale * b.scale * one, out, fast=False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}[out]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("low", "stored"), [(True, False), (True, True), (False, True)])
def test_gradients_are_those_of_the_rounded_operands(
    low: bool, stored: bool, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matmul on its operands in 8 bits, or on wide ones; x is rounded where it is stored.

    With operands in the orders that a GPU wants them in, and as a CPU takes them.
    """
    monkeypatch.setattr(fp8_linear, "needs_copies", lambda _: copies)
    torch.manual_seed(1)
    x = torch.randn(2, 8, 64, requires_grad=True)
    weight = torch.randn(48, 64, requires_grad=True)
    grad = torch.randn(2, 8, 48)
    multiply = product(Operands(1, low=low, stored=stored), low)
    out = multiply(x, weight)
    out.backward(grad)
    x8, w8 = values(x.detach().flatten(0, 1), E4M3), values(weight.detach(), E4M3)
    g8 = values(grad.flatten(0, 1), E5M2)
    wide = x.detach().flatten(0, 1), weight.detach(), grad.flatten(0, 1)
    a, b, c = (x8, w8, g8) if low else wide
    kept = x8 if stored or low else wide[0]
    for found, expected in (
        (out.detach(), (a @ b.t()).view(2, 8, 48)),
        (x.grad, (c @ b).view(2, 8, 64)),
        (weight.grad, c.t() @ kept),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_errors_are_those_of_the_format() -> None:
    """Gaussians: relative Frobenius error 3.75e-2 per tensor (measured)."""
    torch.manual_seed(2)
    x, weight = torch.randn(256, 1024), torch.randn(512, 1024)
    out = product(Operands(1, low=True, stored=False), True)(x, weight)
    exact = x.double() @ weight.double().t()
    error = float((out - exact).norm() / exact.norm())
    assert error == pytest.approx(3.75e-2, rel=0.1)


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_a_tensor_is_cast_once_for_all_its_readers(
    readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Size] = []

    def counted(x: Tensor, *args: Any, **options: Any) -> Cast:
        made.append(x.shape)
        return cast(x, *args, **options)

    monkeypatch.setattr(fp8_linear, "cast", counted)
    operands = Operands(readers, low=True, stored=True)
    for _ in range(2):
        x = torch.randn(4, 16)
        for _ in range(readers):
            operands.take(x)
        assert operands._cast is None, "let go with its last reader"
    assert len(made) == 2


def test_an_interrupted_group_of_readers_starts_again() -> None:
    """Recomputation ends in the middle of a block once all it needs is back."""
    operands = Operands(3, low=True, stored=False)
    first = torch.ones(2, 16)
    operands.take(first)
    second = torch.full((2, 16), 2.0)
    assert float(operands.take(second).scale) == pytest.approx(2 / 448)


def losses(precision: dict[str, Any], steps: int = 4) -> list[float]:
    return train(trainer_of(plan_of(LLAMA, precision)), steps)


@pytest.mark.usefixtures("one_rank")
def test_torchaos_tensorwise_linears_agree_with_ours() -> None:
    """Both scale whole tensors by their largest value and round gradients to E5M2."""
    ours, theirs = losses(COAT), losses({"compute": "fp8", "recipe": "tensorwise"})
    assert theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(COAT, id="coat"),
        pytest.param(STORED, id="stored"),
        pytest.param({"compute": "fp8", "recipe": "rowwise"}, id="rowwise", marks=pytest.mark.slow),
        pytest.param({"compute": "fp8"}, id="default", marks=pytest.mark.slow),
    ],
)
def test_recipes_train_as_bf16_does(precision: dict[str, Any]) -> None:
    wide = losses({"compute": "bf16"})
    assert wide[-1] < wide[0] - 0.1
    assert losses(precision) == pytest.approx(wide, rel=3e-3)


@pytest.mark.usefixtures("one_rank")
def test_plans_choose_linears_by_name() -> None:
    trainer = trainer_of(plan_of(LLAMA, {**STORED, "linears": ["wq", "down"]}))
    block = trainer.pieces[0].blocks["1"]
    assert isinstance(block, Block)
    chosen = {
        name: linear.product is not F.linear
        for module in (block.attention, block.mlp)
        for name, linear in module.named_children()
    }
    # wo reads what attention keeps; the others store their operand whatever they multiply in
    assert chosen == {"wq": True, "wk": True, "wv": True, "wo": False, "gate": True, "up": True,
                      "down": True}  # fmt: skip
    assert float(trainer.forward_backward(tokens(0))) > 0


@pytest.mark.usefixtures("one_rank")
def test_layers_may_differ() -> None:
    """A layer in bf16 between layers in fp8: hidden states are bf16 throughout."""
    import msgspec

    from forerun.plan import Setting

    plan = plan_of(LLAMA, STORED)
    settings = (
        Setting(layers=(0, 0), techniques={"precision": {"compute": "bf16"}}),
        Setting(layers=(1, 1), techniques={"precision": STORED}),
    )
    mixed = msgspec.structs.replace(
        plan, phases=(msgspec.structs.replace(plan.phase, settings=settings),)
    )
    found = train(trainer_of(mixed), 3)
    assert found == pytest.approx(losses(STORED, 3), rel=3e-3)


@pytest.mark.usefixtures("one_rank")
def test_full_recomputation_repeats_8_bit_linears_exactly() -> None:
    plain = trainer_of(plan_of(LLAMA, COAT))
    again = trainer_of(plan_of(LLAMA, COAT, recompute={"mode": "full"}))
    for trainer in (plain, again):
        trainer.forward_backward(tokens(0))
    ours, theirs = again.named_gradients(), plain.named_gradients()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name
