"""Tracing a user's module: what is counted, what becomes a layer, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from forerun import Model, document
from forerun.costmodel import traced
from forerun.costmodel.layout import Layouts
from forerun.costmodel.liveness import liveness
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply
from forerun.errors import InputError
from forerun.executors.trace_module import trace
from forerun.executors.user_module import Trainable, load
from forerun.mesh import Mesh
from forerun.plan import Phase, Stage

ROOT = Path(__file__).resolve().parents[2]
SEQ, BATCH = 32, 5
EXAMPLES = ("examples.mixer:build", "examples.transformer:build", "examples.resnet:build")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def layouts() -> Layouts:
    stages = (Stage(pool="cpu", layers=(0, 0)),)
    phase = Phase(steps=1, seq_tokens=SEQ, micro_batch_seqs=BATCH, num_microbatches=1, mesh=Mesh(),
                  stages=stages)  # fmt: skip
    return Layouts.of(phase)


def repeats(model: Model) -> list[int]:
    return [1, *(layer.repeat for layer in model.layers), 1]


@pytest.mark.parametrize("target", EXAMPLES)
def test_parameters_saved_bytes_and_flops_are_those_of_a_real_step(target: str) -> None:
    """Real tensors on the CPU at a batch that was not traced."""
    model = trace(target, SEQ)
    user = load(target)
    assert model.num_params == sum(p.numel() for p in user.module.parameters())

    known = {t.untyped_storage().data_ptr()
             for t in (*user.module.parameters(), *user.module.buffers())}  # fmt: skip
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    attention: list[int] = []

    def forward_flops(q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
        attention.append(sdpa_flop_count(q, k, v))
        return attention[-1]

    def backward_flops(
        g: list[int], q: list[int], k: list[int], v: list[int], *_: object, **__: object
    ) -> int:
        attention.append(sdpa_backward_flop_count(g, q, k, v))
        return attention[-1]

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
    }
    inputs = user.inputs(BATCH, SEQ)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            loss = Trainable(user)(*inputs)
        saved_bytes = sum(storage.nbytes() for storage in kept.values())
        loss.backward()

    saved, flops = 0.0, 0.0
    for operators, repeat in zip(traced.parts(model), repeats(model), strict=True):
        table = traced.sizes(operators, layouts())
        graph = apply(traced.graph("layer", operators), Options(compute="fp32"))
        saved += repeat * float(liveness(graph, table).saved[0])
        flops += repeat * float(np.sum([part[0] for part in traced.flops(operators, table)]))
    assert saved == pytest.approx(saved_bytes, rel=0.02)
    causal_half = sum(attention) / 2  # torch counts the whole square, the cost model what is causal
    assert flops == counter.get_total_flops() - causal_half
    assert model.flops_per_token(SEQ) * SEQ * BATCH == flops


def test_equal_neighbours_are_one_layer() -> None:
    mixer, resnet = trace(EXAMPLES[0], SEQ), trace(EXAMPLES[2], SEQ)
    assert [layer.repeat for layer in mixer.layers] == [4]
    assert [layer.repeat for layer in resnet.layers] == [3, 2]
    assert resnet.traced is not None
    assert resnet.traced.blocks == ("fine.0", "fine.1", "fine.2", "coarse.0", "coarse.1")
    prefix = {op.module for op in resnet.traced.prefix}
    assert {"stem", "shrink"} <= prefix and not any(name.startswith("fine") for name in prefix)


def test_a_traced_model_is_data() -> None:
    model = trace(EXAMPLES[1], SEQ)
    assert document.from_json(Model, document.to_json(model), "test") == model
    assert trace(EXAMPLES[1], SEQ) == model
    assert trace(EXAMPLES[1], 2 * SEQ) != model


def test_saved_bytes_scale_with_the_batch() -> None:
    """Batch scaling: twice the samples in a micro-batch, twice what is saved of each."""
    model = trace(EXAMPLES[0], SEQ)
    operators = model.layers[0].operators
    graph = apply(traced.graph("layer", operators), Options(compute="fp32"))
    one = traced.sizes(operators, layouts())
    two = {name: 2 * size for name, size in one.items()}
    assert liveness(graph, two).saved[0] == 2 * liveness(graph, one).saved[0]


REFUSED = {
    "import torch\nbuild = 3\n": "build is int",
    "import torch\ndef other(): pass\n": "has no build",
    "raise RuntimeError('two\\nlines')\n": "the module fails (RuntimeError: two lines)",
    "import no_such_package\n": "the module fails (ModuleNotFoundError",
    "def build(): return 1 / 0\n": "the function fails (ZeroDivisionError",
    "def build(): return 'x'\n": "returns str",
    "import torch\ndef build(): return torch.nn.ReLU()\n": "has no parameters to train",
    "import torch\ndef build(): return torch.nn.Linear(2, 2, dtype=torch.bfloat16)\n":
        "is torch.bfloat16",
    "import torch\nclass M(torch.nn.Linear):\n def forward(self, x):\n"
    "  return super().forward(x[x > 0])\n"
    "def build(): return M(2, 2), lambda b, s: (torch.zeros(b, 2),)\n":
        "fails in index without data",
    "import torch\ndef build(): return torch.nn.Linear(2, 2), lambda b, s: (torch.zeros(b, 2),)\n":
        "forward returns [2, 2]",
    "import torch\nclass M(torch.nn.Module):\n def __init__(self):\n  super().__init__()\n"
    "  self.a, self.b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)\n"
    " def forward(self, x): return self.a(x).sum()\n"
    "def build(): return M(), lambda b, s: (torch.zeros(b, 2),)\n": "parameter b.weight gets no",
}  # fmt: skip


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_cannot_be_trained_is_refused_in_one_line(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = list(REFUSED.items())[index]
    name = f"refused_{index}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        trace(f"{name}:build", 8)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no module nowhere"):
        trace("nowhere:build", 8)
