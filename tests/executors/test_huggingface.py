"""Models of transformers from local configs: traced as they run, trained as the library would."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from forerun import InputError, Model, Plan, PlanFile
from forerun.executors import huggingface, machine
from forerun.executors.build import build
from forerun.executors.trace_module import trace
from forerun.executors.user_module import load, seed_everything
from forerun.plan import even_stages

CONFIGS = Path(__file__).parent / "configs"
SEQ = 32
replace = msgspec.structs.replace


def target(name: str) -> str:
    return f"hf:{CONFIGS / name}"


@cache
def traced(name: str) -> Model:
    return trace(target(name), SEQ)


def plan_of(plan_file: PlanFile, name: str) -> Plan:
    """One process, one step of two sequences."""
    plan, model = plan_file.plan, traced(name)
    pool = replace(plan.cluster.pools[0], devices_per_node=1)
    mesh = replace(plan.phase.mesh, dp_replicate=1)
    phase = replace(plan.phase, mesh=mesh, seq_tokens=SEQ,
                    stages=even_stages(model.num_layers, 1, "cpu"))  # fmt: skip
    workload = replace(plan.workload, seq_tokens=SEQ, global_batch_seqs=2)
    cluster = replace(plan.cluster, pools=(pool,))
    return replace(plan, model=model, cluster=cluster, workload=workload, phases=(phase,))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_the_loss_and_gradients_are_the_librarys_own(plan_file: PlanFile, name: str) -> None:
    """Against the library's attention and loss, which shifts the labels itself."""
    plan = plan_of(plan_file, name)
    plan.check()
    trainer = build(plan, device=torch.device("cpu"), module=target(name))
    tokens = torch.randint(256, (2, SEQ + 1), generator=torch.Generator().manual_seed(0))
    loss = trainer.global_loss(trainer.forward_backward(tokens))
    found = trainer.named_gradients()

    seed_everything(plan.workload.seed)
    inner: Any = load(target(name)).module.inner
    inner.set_attn_implementation("sdpa")
    targets = tokens[:, 1:].contiguous()
    given = {"input_ids": tokens[:, :-1], "labels": tokens[:, :-1], "shift_labels": targets}
    expected = inner(**given, use_cache=False).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for key, parameter in inner.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[f"module.inner.{key}"], parameter.grad, atol=1e-6), key


def test_layers_causality_and_tensor_parallelism_are_seen() -> None:
    for name, degrees in (("llama", (2, 4)), ("qwen2", (2,)), ("gpt2", None), ("qwen3", None)):
        model = traced(name)
        assert model.traced is not None
        assert [layer.repeat for layer in model.layers] == [2]
        kinds = [op.kind for op in model.layers[0].operators]
        assert kinds.count("attention") == 1 and "attention_full" not in kinds
        divided = model.traced.divided
        assert (divided.degrees if divided is not None else None) == degrees, name


def test_a_plan_is_known_by_its_config_and_not_by_its_path(
    plan_file: PlanFile, tmp_path: Path
) -> None:
    plan = plan_of(plan_file, "gpt2")
    given = json.loads((CONFIGS / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given))
    machine.check_module(plan, f"hf:{tmp_path / 'config.json'}")
    (tmp_path / "config.json").write_text(json.dumps(given | {"n_embd": 64}))
    with pytest.raises(InputError, match="as it was when it was planned"):
        machine.check_module(plan, f"hf:{tmp_path}")


def test_what_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"hf:nowhere: no such file"):
        trace("hf:nowhere", SEQ)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError, match="is no config of a known model"):
        trace(f"hf:{tmp_path}", SEQ)
    window = json.loads((CONFIGS / "llama" / "config.json").read_text())
    window |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(window | {"sliding_window": 16}))
    with pytest.raises(InputError, match="is beyond the model's window of 16"):
        trace(f"hf:{tmp_path}", SEQ)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers; pip install 'forerun\[hf\]'"):
        huggingface.maker(target("llama"))
