"""Quantisation of a model on a calibration text, and adapters on what it wrote."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from forerun.errors import InputError
from forerun.executors import init
from forerun.executors.build import build
from forerun.executors.checkpoints import folder
from forerun.executors.checkpoints.planners import save_alone
from forerun.executors.checkpoints.shards import PARAMETER, whole
from forerun.executors.frozen import grid
from forerun.executors.frozen.stored import Stored
from forerun.executors.quantize import _facts, quantize
from forerun.executors.trainer import Trainer
from forerun.plan import Plan

from .plans import CPU, GPT, LLAMA, plan_of, tokens

pytestmark = pytest.mark.usefixtures("one_rank")
SAMPLES = 24


def plan(base: str = "gptq3_g32", model: str = "llama", **changes: object) -> Plan:
    found = plan_of({"llama": LLAMA, "gpt": GPT}[model], lora={"rank": 4, "base": base})
    workload = msgspec.structs.replace(found.workload, **changes)
    return msgspec.structs.replace(found, workload=workload)


def checkpoint(place: Path, of: Plan, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A checkpoint of weights drawn with another seed; the weights."""
    dense = build(plan_of(of.model), device=CPU)
    weights = {
        name: scale * init.full_parameter(name, tuple(p.shape), of.model, 99, CPU)
        for name, p in dense.pieces[0].named_parameters()
    }
    place.mkdir()
    written = folder.partial(place, 0)
    save_alone({f"{PARAMETER}.{name}": whole(value) for name, value in weights.items()}, written)
    files = {path.name: folder.digest(path) for path in written.iterdir()}
    folder.complete(written, msgspec.structs.replace(_facts(of), files=files))
    return weights


def frozen(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The matrices of linears as the trainer multiplies with them."""
    return {
        name.removesuffix(".stored"): module.weight(torch.float32)
        for name, module in trainer.pieces[0].named_modules()
        if isinstance(module, Stored)
    }


@pytest.mark.parametrize(
    ("model", "act_order"),
    [("llama", False), ("gpt", True), pytest.param("llama", True, marks=pytest.mark.slow)],
)
def test_what_is_written_is_what_adapters_train_beside(
    tmp_path: Path, model: str, act_order: bool
) -> None:
    of = plan(model=model)
    weights = checkpoint(tmp_path / "dense", of)
    found = quantize(of, tmp_path / "low", base=tmp_path / "dense", samples=SAMPLES,
                     act_order=act_order)  # fmt: skip
    assert {loss.name for loss in found.losses} == {
        name.removesuffix(".weight")
        for name in weights
        if name.startswith("blocks") and "norm" not in name and "bias" not in name
    }
    assert found.gain > 0.2
    trainer = build(of, device=CPU, base=tmp_path / "low")
    matrices = frozen(trainer)
    for loss in found.losses:
        error = (matrices[loss.name] - weights[f"{loss.name}.weight"]).norm()
        assert 0 < float(error / weights[f"{loss.name}.weight"].norm()) < 0.35  # 3 bits
    rest = dict(trainer.pieces[0].named_parameters())
    for name in ("embedding.weight", "blocks.0.mlp_norm.weight", "norm.weight"):
        assert torch.equal(rest[name], weights[name])


def test_a_model_loses_less_than_by_rounding(tmp_path: Path) -> None:
    """Logits against those of the weights as they come, on text that was not calibrated on."""
    of = plan("gptq3_g32")
    weights = checkpoint(tmp_path / "dense", of, scale=2.0)
    quantize(of, tmp_path / "low", base=tmp_path / "dense", samples=64)
    exact = build(plan_of(LLAMA), device=CPU)
    rounded, calibrated = (build(of, device=CPU, base=x) for x in (None, tmp_path / "low"))
    for name, parameter in exact.pieces[0].named_parameters():
        parameter.data.copy_(weights[name])
    for name, module in rounded.pieces[0].named_modules():
        if isinstance(module, Stored):
            near = grid.round_to_nearest(
                weights[name.replace(".stored", ".weight")], grid.Format.of("gptq3_g32")
            )
            for part, value in grid.packed(near, grid.Format.of("gptq3_g32")).items():
                module.get_parameter(part).data.copy_(value)
    for name, parameter in rounded.pieces[0].named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    with torch.no_grad():
        text = torch.frombuffer(
            bytearray(b"def quantize(weight): return weight # "), dtype=torch.uint8
        )
        x = text[:32].long()[None]
        logits = [t.pieces[0](x) for t in (exact, rounded, calibrated)]
    errors = [float((found - logits[0]).square().mean()) for found in logits[1:]]
    assert errors[1] < 0.8 * errors[0]


def test_nf4_is_made_of_a_checkpoint(tmp_path: Path) -> None:
    of = plan("nf4", model="llama")
    layers = tuple(msgspec.structs.replace(x, ffn_hidden=384) for x in LLAMA.layers)
    of = msgspec.structs.replace(of, model=msgspec.structs.replace(LLAMA, layers=layers))
    weights = checkpoint(tmp_path / "dense", of)
    trainer = build(of, device=CPU, base=tmp_path / "dense")
    for name, matrix in frozen(trainer).items():
        weight = weights[f"{name}.weight"]
        assert float((matrix - weight).norm() / weight.norm()) < 0.1
    assert torch.isfinite(trainer.forward_backward(tokens(0)))


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    of, dense, low = plan(), tmp_path / "dense", tmp_path / "low"
    checkpoint(dense, of)
    with pytest.raises(InputError, match=r"^lora.base=nf4: unknown|^lora.base=nf4: .* 64"):
        quantize(plan("nf4"), low, base=dense)
    with pytest.raises(InputError, match=r"^data=.*: no such file or folder"):
        quantize(of, low, base=dense, data=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"^data=.*holds 5 bytes, a sequence takes"):
        (tmp_path / "short.txt").write_text("short")
        quantize(of, low, base=dense, data=str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match=r"^base=.*: holds no checkpoint"):
        quantize(of, low, base=tmp_path / "nothing")
    with pytest.raises(
        InputError, match=r"^base=.*: is a checkpoint of llama, the plan trains gpt"
    ):
        quantize(plan(model="gpt"), low, base=dense)
    with pytest.raises(InputError, match=r"^base=.*: holds no codes of blocks.0.attention.wq"):
        build(of, device=CPU, base=dense)
    quantize(of, low, base=dense, samples=2)
    with pytest.raises(InputError, match=r"^checkpoint=.*: holds checkpoints"):
        quantize(of, low, base=dense, samples=2)
    with pytest.raises(InputError, match=r"codes as \[.*\], not \["):
        build(plan("gptq4_g32"), device=CPU, base=low)
    with pytest.raises(InputError, match=r"attention.wq.weight is quantised there"):
        quantize(of, tmp_path / "again", base=low, samples=2)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    of = plan()
    checkpoint(tmp_path / "dense", of, scale=float("nan"))
    with pytest.raises(InputError, match=r"^base=blocks.0.attention.wq: has weights that are not"):
        quantize(of, tmp_path / "low", base=tmp_path / "dense", samples=2)
    assert not folder.steps(tmp_path / "low")
