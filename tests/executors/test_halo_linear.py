"""Linears on codes of rotated operands: equal to the plain one without codes, better than
unrotated ones with outliers, and what runs with them is what the ledger says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forerun.costmodel.halo_levels import LEVELS
from forerun.errors import InputError
from forerun.executors import halo_gather, halo_linear
from forerun.executors.build import check_supported
from forerun.executors.halo_gather import GatheredCodes
from forerun.executors.halo_linear import How, RotatedCast, product
from forerun.executors.torch_compat import coded_matmul
from forerun.kernels.fp8_cast import Cast
from forerun.kernels.hadamard import FORMATS, cast_low, rotate

from .plans import LLAMA, _model, plan_of, tokens, train, trainer_of


def precision(recipe: str, compute: str = "int8", **more: Any) -> dict[str, Any]:
    return {"compute": compute, "recipe": recipe, **more}


def gradients(
    x: Tensor, weight: Tensor, grad: Tensor, recipe: str, name: str = "int8"
) -> tuple[Tensor, Tensor, Tensor]:
    """The product and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = product(RotatedCast(1, How(name, LEVELS[recipe])))(x, weight)
    out.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (2, 48, 160), weight (96, 160), gradient (2, 48, 96)."""
    torch.manual_seed(3)
    shapes = (2, 48, 160), (96, 160), (2, 48, 96)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)  # pyright: ignore


@pytest.mark.parametrize("recipe", LEVELS)
def test_without_codes_every_level_is_the_plain_linear(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_wide(
        x: Tensor, name: str, scale: Any = None, *, rotated: bool = False, **orders: bool
    ) -> Cast:
        wide = rotate(x) if rotated else x
        return Cast(wide, wide.t().contiguous(), torch.ones(()))

    def plain_matmul(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (a @ b.t() * scale).to(dtype)

    monkeypatch.setattr(halo_linear, "cast_low", kept_wide)
    monkeypatch.setattr(halo_linear, "turned", lambda x: x.t().contiguous())
    monkeypatch.setattr(halo_linear, "coded_matmul", plain_matmul)
    x, weight, grad = data()
    found = gradients(x, weight, grad, recipe)
    expected = (
        x @ weight.t(),
        grad @ weight,
        grad.flatten(0, 1).t() @ x.flatten(0, 1),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recipe", LEVELS)
def test_errors_are_those_of_the_format(recipe: str, name: str) -> None:
    x, weight, grad = data(torch.bfloat16)
    found = gradients(x, weight, grad, recipe, name)
    wide = [t.double() for t in (x, weight, grad)]
    x_MK, grad_MN = wide[0].flatten(0, 1), wide[2].flatten(0, 1)
    expected = wide[0] @ wide[1].t(), wide[2] @ wide[1], grad_MN.t() @ x_MK
    limit = {"int8": 0.02, "fp6": 0.06, "fp4": 0.3}[name]
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < limit


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_rotations_take_outliers_of_inputs_and_of_gradients() -> None:
    """0.5 % of the columns of x, or of the tokens of the gradient, 100 times as large: with
    rotations along K and along tokens, the error of a product in int8 is a quarter or less."""
    torch.manual_seed(4)
    x, weight, grad = torch.randn(256, 1024), torch.randn(512, 1024), torch.randn(256, 512)
    x[:, ::200] *= 100
    grad[::200] *= 100
    exact = x.double() @ weight.double().t(), grad.double() @ weight.double()
    plain, rotated = (gradients(x, weight, grad, recipe) for recipe in ("halo0", "halo2"))
    errors = [(error(a, e), error(b, e)) for a, b, e in zip(plain, rotated, exact, strict=False)]
    assert errors[0][0] > 4 * errors[0][1], errors
    # tokens without an outlier lose what is rounded by the scale of those with one
    usual = [i for i in range(256) if i % 200]
    of_usual = [error(found[1][usual], exact[1][usual]) for found in (plain, rotated)]
    assert of_usual[0] > 1.5 * of_usual[1], of_usual


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_codes_are_exact(name: str) -> None:
    torch.manual_seed(5)
    a, b = (cast_low(torch.randn(n, 72), name) for n in (24, 40))
    assert a.codes_MK is not None and b.codes_MK is not None
    one = torch.ones(())
    found = coded_matmul(a.codes_MK, b.codes_MK, one, torch.float32)
    assert torch.equal(found, a.codes_MK.float() @ b.codes_MK.float().t())


def test_values_that_are_not_finite_reach_the_loss() -> None:
    x, weight, grad = data()
    x[0, 3, 5] = float("inf")
    out, _, _ = gradients(x, weight, grad, "halo2")
    assert bool(out.isnan().all())


def test_frozen_weights_keep_no_input() -> None:
    x, weight, _ = data()
    out: Tensor = product(RotatedCast(1, How("int8", LEVELS["halo2"])))(x.requires_grad_(), weight)
    node: Any = out.grad_fn
    kept = [t for t in node.next_functions and node.saved_tensors if t is not None]
    assert all(t.shape != x.shape for t in kept)


def test_gathered_codes_stand_for_their_weight() -> None:
    """The same product and gradients from codes as from the weight that they were made of."""
    x, weight, grad = data()
    codes = cast_low(weight, "int8", rotated=True)
    assert codes.codes_MK is not None
    coded = torch.nn.Parameter(GatheredCodes(codes.codes_MK, codes.scale, torch.float32))
    level = LEVELS["halo2-hq-xh"]
    own = x.clone().requires_grad_()
    out = product(RotatedCast(1, How("int8", level)))(own, coded)
    out.backward(grad)
    expected = gradients(x, weight, grad, "halo2-xh")
    assert torch.equal(out.detach(), expected[0])
    assert own.grad is not None and torch.equal(own.grad, expected[1])
    assert coded.grad is not None and torch.equal(coded.grad, expected[2])
    assert type(coded.grad) is Tensor
    with pytest.raises(NotImplementedError, match="gathered as codes"):
        coded.add(1)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=() if name in ("halo2", "halo2-hq-xh") else pytest.mark.slow)
        for name in LEVELS
    ],
)
def test_recipes_train_as_bf16_does(recipe: str) -> None:
    wide = train(trainer_of(plan_of(LLAMA, {"compute": "bf16"})), 4)
    assert wide[-1] < wide[0] - 0.1
    assert train(trainer_of(plan_of(LLAMA, precision(recipe))), 4) == pytest.approx(wide, rel=2e-3)


@pytest.mark.usefixtures("one_rank")
def test_plans_choose_linears_by_name() -> None:
    trainer = trainer_of(plan_of(LLAMA, precision("halo1-hq", linears=["wq", "down"])))
    chosen = [
        name
        for name, module in trainer.pieces[0].named_modules()
        if getattr(module, "product", F.linear) is not F.linear
    ]
    assert [name.split(".")[-1] for name in chosen] == ["wq", "down"] * 2
    assert len(trainer.gathers[0].parameters) == 4
    assert float(trainer.forward_backward(tokens(0))) > 0


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recipe", ["halo2", "halo2-hq-xh"])
def test_full_recomputation_repeats_linears_exactly(recipe: str) -> None:
    plain = trainer_of(plan_of(LLAMA, precision(recipe)))
    again = trainer_of(plan_of(LLAMA, precision(recipe), recompute={"mode": "full"}))
    for trainer in (plain, again):
        trainer.forward_backward(tokens(0))
    ours, theirs = again.named_gradients(), plain.named_gradients()
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name


@pytest.mark.usefixtures("one_rank")
def test_scales_follow_the_weights() -> None:
    trainer = trainer_of(plan_of(LLAMA, precision("halo1-hq")))
    (gathers,) = trainer.gathers
    trainer.forward_backward(tokens(0))
    before = gathers.scales.clone()
    with torch.no_grad():
        halo_gather.local_tensor(gathers.parameters[0]).mul_(2.0)
    trainer.forward_backward(tokens(0))
    assert float(gathers.scales[0] / before[0]) == pytest.approx(2.0, rel=1e-6)
    assert torch.equal(gathers.scales[1:], before[1:])


BAD: list[tuple[dict[str, Any], Any, str]] = [
    (precision("halo2", "fp8"), LLAMA, "rotations gain nothing in fp8"),
    (precision("halo1", "bf16"), LLAMA, "all matmuls run in bf16"),
    (precision("coat"), LLAMA, "does not scale int8"),
    (precision("halo2", activations="fp8"), LLAMA, "says itself what its linears keep"),
    (
        precision("halo1"),
        _model("odd", 128, heads=4, kv_heads=2, ffn_hidden=312),
        "the input of down is 312 wide",
    ),
]


@pytest.mark.parametrize(("settings", "model", "reason"), BAD, ids=[row[2] for row in BAD])
def test_what_cannot_be_is_refused_in_one_line(
    settings: dict[str, Any], model: Any, reason: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_supported(plan_of(model, settings))
    assert reason in str(refused.value) and refused.value.remedy
    assert "\n" not in str(refused.value)


def test_level_0_takes_any_shape() -> None:
    check_supported(
        plan_of(_model("odd", 128, heads=4, kv_heads=2, ffn_hidden=312), precision("halo0"))
    )


def with_outliers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every 64th channel of norms 100 times as large, the columns that read it as much smaller."""
    found = {name: weight.clone() for name, weight in weights.items()}
    readers = {"attention_norm": ("wq", "wk", "wv"), "mlp_norm": ("gate", "up")}
    for name in weights:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in readers and block:
            part = "attention" if norm == "attention_norm" else "mlp"
            found[name][::64] *= 100
            for reader in readers[norm]:
                found[f"{block}.{part}.{reader}.weight"][:, ::64] /= 100
    return found


@pytest.mark.usefixtures("one_rank")
def test_fine_tuning_with_outliers_loses_less_than_a_hundredth() -> None:
    """From the same parameters: losses of rotated levels within 1 % of bf16's, and their first
    gradient twice as near to it, or more, as without rotations."""
    start = trainer_of(plan_of(LLAMA, {"compute": "bf16"}))
    train(start, 3)
    weights = with_outliers(start.named_parameters_full())
    losses: dict[str, list[float]] = {}
    first: dict[str, dict[str, Tensor]] = {}
    for name in ("bf16", "halo0", "halo2"):
        settings = {"compute": "bf16"} if name == "bf16" else precision(name)
        trainer = trainer_of(plan_of(LLAMA, settings))
        with torch.no_grad():
            for key, parameter in trainer.pieces[0].named_parameters():
                halo_gather.local_tensor(parameter).copy_(weights[key])
        trainer.forward_backward(tokens(3))
        first[name] = {key: g.clone() for key, g in trainer.named_gradients().items()}
        trainer.optimizer.zero_grad(set_to_none=True)
        losses[name] = train(trainer, 3, first=3)
    assert losses["halo2"] == pytest.approx(losses["bf16"], rel=0.01)
    off = [
        sum(float((first[name][key] - g).norm()) ** 2 for key, g in first["bf16"].items()) ** 0.5
        for name in ("halo0", "halo2")
    ]
    assert off[0] > 2 * off[1], off
