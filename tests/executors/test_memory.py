"""The counter of live tensors, on steps whose memory can be worked out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forerun.executors.measure.memory import LiveTensors

FP32 = 4
ROWS, WIDTH, INNER, OUT = 16, 64, 128, 32


def count(live: LiveTensors) -> int:
    return sum(live.peak().values())


def test_views_count_once_and_freed_tensors_do_not() -> None:
    with LiveTensors() as live:
        kept = torch.ones(1000)
        half = kept[:500]
        square = kept.view(10, 100)
        for _ in range(3):
            torch.ones(250)
    assert half.shape == (500,) and square.shape == (10, 100)
    assert count(live) == (1000 + 250) * FP32


def test_peak_is_a_moment_not_a_sum_of_peaks() -> None:
    with LiveTensors() as live:
        first = torch.ones(300)
        del first
        second = torch.ones(200)
        third = torch.ones(50)
    assert len(second) == 200 and len(third) == 50
    assert count(live) == 300 * FP32


def test_in_place_operators_take_nothing() -> None:
    x = torch.ones(100)
    with LiveTensors() as live:
        x.add_(1).mul_(2)
    assert count(live) == 100 * FP32


def test_emptied_storage_counts_as_freed_and_refilled_as_gathered() -> None:
    buffer = torch.ones(100)
    resize = torch.UntypedStorage.resize_
    with LiveTensors() as live:
        buffer.untyped_storage().resize_(0)
        other = torch.ones(100)
        del other
        buffer.untyped_storage().resize_(300 * FP32)
    assert live.peak()["gathered_parameters"] == 300 * FP32
    assert count(live) == 300 * FP32
    assert torch.UntypedStorage.resize_ is resize, "the wrapped method is put back"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


PARAMETERS = (WIDTH * INNER + INNER * OUT) * FP32


def train(model: Mlp, live: LiveTensors) -> None:
    x = torch.ones(ROWS, WIDTH)
    with live:
        live.hold(model.parameters(), "parameters")
        live.begin("forward")
        loss = model(x).square().sum()
        live.end("forward")
        live.begin("backward")
        loss.backward()
        live.end("backward")
        live.hold([p.grad for p in model.parameters() if p.grad is not None], "gradients")


def test_training_step_by_hand() -> None:
    """Peak while the first layer's gradient is made; torch frees what a node saved after it.

    Alive then: both parameters, both gradients, the input, the gradient of the hidden layer before
    gelu, and two scalars (the loss and its gradient).
    """
    live = LiveTensors()
    train(Mlp(), live)
    peak = live.peak()
    assert peak["parameters"] == PARAMETERS
    assert peak["gradients"] == PARAMETERS
    assert peak["workspace"] == (ROWS * WIDTH + ROWS * INNER + 1) * FP32
    assert peak["activations"] == 1 * FP32
    assert count(live) == sum(peak.values())


def test_saved_activations_count_until_backward() -> None:
    """Forward alone: gelu saves its input, the matmul gelu's output, square its input; the loss."""
    model, x = Mlp(), torch.ones(ROWS, WIDTH)
    with LiveTensors() as live:
        live.hold(model.parameters(), "parameters")
        live.begin("forward")
        loss = model(x).square().sum()
        live.end("forward")
    saved = 2 * ROWS * INNER + ROWS * OUT
    assert live.peak()["activations"] == (saved + 1) * FP32
    assert live.peak()["workspace"] == (ROWS * WIDTH + ROWS * OUT) * FP32  # input, square's result
    assert loss.requires_grad


def test_recomputed_activations_are_not_kept_by_forward() -> None:
    model, x = Mlp(), torch.ones(ROWS, WIDTH, requires_grad=True)
    with LiveTensors() as live:
        live.hold(model.parameters(), "parameters")
        live.begin("forward")
        out = checkpoint(model, x, use_reentrant=False)
        live.end("forward")
        assert isinstance(out, Tensor)
    kept = [change for record, change in live.log if record.outlived_mark]
    assert sum(kept) == out.numel() * FP32


def test_logits_are_told_by_shape_and_place() -> None:
    """Hidden states as wide as the vocabulary are activations until the final norm has run."""
    tokens, vocab = 8, 500
    norm = nn.LayerNorm(vocab, elementwise_affine=False)
    x = torch.ones(tokens, vocab, requires_grad=True)
    live = LiveTensors(logits_shape=(tokens, vocab))
    hook = live.watch_head(norm)
    with live:
        live.begin("forward")
        hidden = x * 2
        normed = norm(hidden)
        logits = normed * 3
        table = torch.ones(vocab, 8)
        live.end("forward")
    hook.remove()
    assert logits.numel() == tokens * vocab and table.numel() == 4000
    assert live.peak()["logits_loss"] == tokens * vocab * FP32
    norm_statistics = 2 * tokens
    assert live.peak()["activations"] == (2 * tokens * vocab + norm_statistics + 4000) * FP32


def test_optimizer_states_and_gradients_are_named() -> None:
    weight = nn.Parameter(torch.ones(100))
    adamw = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(100)
    adamw.step()
    states = [value for value in adamw.state[weight].values() if isinstance(value, Tensor)]
    with LiveTensors() as live:
        live.hold([weight], "parameters")
        live.hold(states, "optimizer")
        live.hold([weight.grad], "gradients")
        adamw.step()
    peak = live.peak()
    assert peak["parameters"] == peak["gradients"] == 400
    assert peak["optimizer"] == 2 * 400 + FP32  # two moments and the step counter
