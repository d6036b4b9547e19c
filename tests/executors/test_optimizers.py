"""Optimisers as they run: bytes of their states against the ledger, and states that survive."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forerun.costmodel import estimate
from forerun.errors import InputError
from forerun.executors.adamw_fp8 import AdamWFp8
from forerun.executors.measure.memory import local_tensors
from forerun.executors.optimizer import make_optimizer
from forerun.executors.trainer import Trainer
from forerun.kernels import adamw_fp8 as kernel

from .plans import MODELS, plan_of, train, trainer_of

pytestmark = pytest.mark.usefixtures("one_rank")
OPTIMIZERS = ("adamw", "adamw_fp8", "adamw8bit", "adamw4bit", "adamw_fp8_block", "sgd")
ALWAYS = ("adamw_fp8",)
"""Those of the default run beyond one step."""


def cases() -> list[Any]:
    """(model, optimiser): all of them on one model by default."""
    found: list[Any] = []
    for model in ("llama", "gpt", "nemotron"):
        for optimizer in OPTIMIZERS:
            marks = () if model == "llama" else (pytest.mark.slow,)
            found.append(pytest.param(model, optimizer, marks=marks))
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all storages of an optimiser's states."""
    tensors = [
        part
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
        for part in local_tensors(value)
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("model", "optimizer"), cases())
def test_states_take_the_predicted_bytes(model: str, optimizer: str) -> None:
    """Within 0.1 %: fallbacks of small tensors and tables are in the ledger, step counters are
    not."""
    plan = plan_of(MODELS[model], None, optimizer)
    trainer = trainer_of(plan)
    train(trainer, 1)
    predicted = estimate(plan).memory_terms_bytes["optimizer"]
    assert state_bytes(trainer.optimizer) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=() if name in ALWAYS else (pytest.mark.slow,))
        for name in OPTIMIZERS[1:5]
    ],
)
def test_low_bit_moments_train_as_plain_ones_do(optimizer: str) -> None:
    plain = train(trainer_of(plan_of()), 8)
    low = train(trainer_of(plan_of(optimizer=optimizer)), 8)
    assert plain[-1] < plain[0] - 0.5
    assert low == pytest.approx(plain, rel=0.02)


def parameters(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for piece in trainer.pieces for p in piece.parameters()]


def through_bytes(document: Any) -> Any:
    """What is left of a document after it was written and read again."""
    file = io.BytesIO()
    torch.save(document, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> None:
    plan = plan_of(optimizer="adamw_fp8")
    whole = trainer_of(plan)
    losses = train(whole, 5)
    first, second = trainer_of(plan), trainer_of(plan)
    train(first, 3)
    second.pieces[0].load_state_dict(first.pieces[0].state_dict())
    second.optimizer.load_state_dict(through_bytes(first.optimizer.state_dict()))
    assert train(second, 2, first=3) == losses[3:]
    for ours, theirs in zip(parameters(second), parameters(whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_loaded_as_they_were_saved(dtype: torch.dtype) -> None:
    """torch alone would cast codes and scales to the dtype of the parameter."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 200).to(dtype)), nn.Parameter(torch.randn(9).to(dtype))]

    def optimizer() -> AdamWFp8:
        found = AdamWFp8(weights, lr=1e-3)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        found.step()
        return found

    saved, other = optimizer(), optimizer()
    other.load_state_dict(through_bytes(saved.state_dict()))
    for weight in weights:
        for name, value in saved.state[weight].items():
            found = other.state[weight][name]
            assert found.dtype == value.dtype and torch.equal(found, value), name
    assert saved.state[weights[0]]["exp_avg"].dtype is torch.uint8
    assert saved.state[weights[1]]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize("shape", [(3, 128), (3, 200), (2, 3, 64), (5, 40), (300,), (1,)])
def test_every_shape_takes_adamws_first_step(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    value, gradient = torch.randn(shape), torch.randn(shape)
    results = []
    for name in ("adamw", "adamw_fp8"):
        weight = nn.Parameter(value.clone())
        weight.grad = gradient.clone()
        make_optimizer(name, [weight], 1e-2).step()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_gradients_that_are_not_finite_change_nothing_and_are_counted() -> None:
    torch.manual_seed(2)
    weights = [nn.Parameter(torch.randn(2, 256)), nn.Parameter(torch.randn(16))]
    optimizer = AdamWFp8(weights, lr=1e-2)
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.inf)
    before = [weight.detach().clone() for weight in weights]
    optimizer.step()
    assert optimizer.num_skipped == 2 * 2 + 1
    for old, weight in zip(before, weights, strict=True):
        assert torch.equal(old, weight)
    for state in optimizer.state.values():
        for name, value in state.items():
            assert bool(value.float().isfinite().all()), name


def test_learning_rates_may_change_between_steps() -> None:
    weight = nn.Parameter(torch.ones(2, 128))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamWFp8([weight], lr=1.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 128), 0.75), rtol=1e-5, atol=0.0)


def test_torchaos_8_bit_floats_are_blocks_with_one_scale() -> None:
    """One step on (256, 256): the codes of its AdamWFp8 are those of max |x| / 448 per 256."""
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(256, 256))
    weight.grad = torch.randn_like(weight)
    optimizer = make_optimizer("adamw_fp8_block", [weight], 1e-3)
    optimizer.step()
    moment = 0.1 * weight.grad
    blocks = moment.view(-1, 256)
    scale = blocks.abs().amax(1) / 448
    codes = (blocks / scale[:, None]).to(torch.float8_e4m3fn)
    kept = optimizer.state[weight]["exp_avg"]
    torch.testing.assert_close(kept.scale, scale, rtol=1e-6, atol=0.0)
    different = codes.view(torch.uint8).flatten() != kept.codes.view(torch.uint8).flatten()
    assert float(different.float().mean()) < 1e-3  # a lerp rounds otherwise than a product


@pytest.mark.slow
def test_torchaos_compiled_step_is_its_plain_one() -> None:
    """On a CPU steps run as they are written; on CUDA they are compiled."""
    import torchao.optim

    torch.manual_seed(4)
    value, gradient = torch.randn(64, 256), torch.randn(64, 256)
    results = []
    for compiled in (False, True):
        weight = nn.Parameter(value.clone())
        weight.grad = gradient.clone()
        optimizer = make_optimizer("adamw8bit", [weight], 1e-3)
        if compiled:
            optimizer = torchao.optim.AdamW8bit([weight], lr=1e-3, betas=(0.9, 0.95),
                                                eps=1e-8, weight_decay=0.1)  # fmt: skip
        for _ in range(2):
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_offload_runs_on_cuda_alone() -> None:
    with pytest.raises(InputError, match=r"^optimizer=adamw_offload: cpu has no host"):
        trainer_of(plan_of(optimizer="adamw_offload"))


def test_groups_of_rows_do_not_depend_on_how_rows_are_shared_out() -> None:
    x = torch.randn(12, 300)
    codes, groups = kernel.pack(x)
    parts = [kernel.pack(part) for part in x.split([5, 7])]
    assert torch.equal(torch.cat([part[0] for part in parts]), codes)
    assert torch.equal(torch.cat([part[1] for part in parts]), groups)
