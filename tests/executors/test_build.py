"""What a built trainer is, on one process, and what it refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from forerun.catalogs import load_cluster
from forerun.errors import InputError, RunFailed
from forerun.executors.build import build, check_supported
from forerun.executors.init import full_parameter, local_part
from forerun.executors.support import check_kept
from forerun.executors.trainer import Trainer
from forerun.experts import Experts
from forerun.lengths import Lengths
from forerun.mesh import Mesh
from forerun.model import LatentAttention, Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.workload import Optimizer, Workload

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
LAYER = Layer(repeat=2, heads=4, kv_heads=2, head_dim=4, ffn_hidden=24)
MODEL = Model(name="tiny", hidden=16, vocab=32, layers=(LAYER,))
GPT_LAYER = Layer(repeat=2, heads=2, kv_heads=2, head_dim=8, ffn_hidden=24, mlp="squared_relu",
                  norm="layernorm", bias=True)  # fmt: skip
GPT = Model(name="tiny-gpt", hidden=16, vocab=32, layers=(GPT_LAYER,), tied_embeddings=True,
            positions="learned", max_positions=8)  # fmt: skip

MOE_AND_LATENT = Model(
    name="tiny-moe", hidden=16, vocab=32,
    layers=(
        Layer(repeat=1, heads=2, kv_heads=1, head_dim=4, mlp="gelu",
              experts=Experts(num_experts=4, top_k=2, ffn_hidden=8)),
        Layer(repeat=1, heads=2, kv_heads=2, head_dim=6,
              latent=LatentAttention(q_lora_rank=6, kv_lora_rank=4, qk_nope_head_dim=2,
                                     qk_rope_head_dim=4, v_head_dim=2),
              experts=Experts(num_experts=3, top_k=1, ffn_hidden=8, shared_ffn_hidden=4)),
    ),
)  # fmt: skip


def make_plan(model: Model = MODEL, recompute: str = "none", **changes: object) -> Plan:
    phase = Phase(
        steps=1,
        seq_tokens=8,
        micro_batch_seqs=2,
        num_microbatches=2,
        mesh=Mesh(),
        stages=even_stages(model.num_layers, 1, "cpu"),
        settings=(Setting(layers=(0, 1), techniques=techniques("fp32", recompute)),),
    )
    cluster = load_cluster("1xcpu")
    phase = msgspec.structs.replace(
        phase, stages=even_stages(model.num_layers, 1, cluster.pools[0].name)
    )
    return Plan(
        model=model,
        cluster=cluster,
        workload=Workload(seq_tokens=8, global_batch_seqs=4),
        phases=(msgspec.structs.replace(phase, **changes),),
    )


class Recorder:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def begin(self, name: str) -> None:
        self.heard.append(f"<{name}")

    def end(self, name: str) -> None:
        self.heard.append(f"{name}>")


def batch() -> torch.Tensor:
    return torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0))


def trainer_of(plan: Plan) -> Trainer:
    return build(plan, device=CPU)


@pytest.mark.parametrize("model", [MODEL, GPT, MOE_AND_LATENT])
def test_the_decoder_has_the_parameters_that_the_model_says(model: Model) -> None:
    pieces = trainer_of(make_plan(model)).pieces
    assert sum(p.numel() for p in pieces[0].parameters()) == model.num_params


def test_marks_come_per_micro_batch_with_recompute_inside_backward() -> None:
    trainer = trainer_of(make_plan(recompute="full"))
    recorder = Recorder()
    trainer.observer = recorder
    trainer.forward_backward(batch())
    trainer.optimizer_step()
    recompute = ["<recompute", "recompute>"] * 2
    micro = ["<forward", "forward>", "<backward", *recompute, "backward>"]
    assert recorder.heard == micro * 2 + ["<optimizer", "optimizer>"]


def test_loss_is_the_mean_over_micro_batches() -> None:
    trainer = trainer_of(make_plan())
    whole = trainer_of(make_plan(micro_batch_seqs=4, num_microbatches=1))
    assert float(trainer.forward_backward(batch())) == pytest.approx(
        float(whole.forward_backward(batch())), rel=1e-6
    )


def test_a_parameter_without_a_gradient_is_named() -> None:
    trainer = trainer_of(make_plan())
    trainer.forward_backward(batch())
    trainer.check_gradients()
    trainer.pieces[0].get_parameter("blocks.1.mlp.up.weight").grad = None
    with pytest.raises(RunFailed, match=r"blocks\.1\.mlp\.up\.weight"):
        trainer.named_gradients()


def test_nothing_but_states_outlives_a_step() -> None:
    """Parameters and two AdamW moments: no gradient, no activation, no logits."""
    trainer = trainer_of(make_plan())
    trainer.forward_backward(batch())
    trainer.optimizer_step()
    assert all(p.grad is None for p in trainer.pieces[0].parameters())
    states = trainer.optimizer.state_dict()["state"].values()
    moments = [value for state in states for value in state.values() if value.dim() > 0]
    assert sum(m.numel() for m in moments) == 2 * MODEL.num_params


def test_bf16_keeps_fp32_masters_and_states() -> None:
    settings = (Setting(layers=(0, 1), techniques=techniques("bf16", "none")),)
    trainer = trainer_of(make_plan(settings=settings))
    trainer.forward_backward(batch())
    gradients = trainer.named_gradients()
    trainer.optimizer_step()
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert {p.dtype for p in trainer.pieces[0].parameters()} == {torch.float32}
    moments = trainer.optimizer.state_dict()["state"][0]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32


def test_initial_parameters_depend_on_name_and_seed_alone() -> None:
    shape = (64, 48)
    first = full_parameter("blocks.0.attention.wq.weight", shape, MODEL, 3, CPU)
    assert torch.equal(first, full_parameter("blocks.0.attention.wq.weight", shape, MODEL, 3, CPU))
    other_name = full_parameter("blocks.1.attention.wq.weight", shape, MODEL, 3, CPU)
    other_seed = full_parameter("blocks.0.attention.wq.weight", shape, MODEL, 4, CPU)
    assert not torch.equal(first, other_name) and not torch.equal(first, other_seed)
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)
    residual = full_parameter("blocks.0.attention.wo.weight", shape, MODEL, 3, CPU)
    assert float(residual.std()) == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 * 2 layers)


@pytest.mark.parametrize("dim", [0, 1])
def test_tp_parts_make_the_whole(dim: int) -> None:
    whole = torch.arange(48.0).view(6, 8)
    parts = [local_part(whole, whole, dim, (rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim), whole)


EXPERTS = Experts(num_experts=4, top_k=2, ffn_hidden=8)
MOE = msgspec.structs.replace(MODEL, layers=(msgspec.structs.replace(LAYER, experts=EXPERTS),))
LATENT = LatentAttention(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                         v_head_dim=4)  # fmt: skip
FP16 = (Setting(layers=(0, 1), techniques={"precision": {"compute": "fp16"}}),)
HOSTED = (Setting(layers=(0, 1), techniques=techniques("fp32", "none")
                  | {"offload": {"states": "experts"}}),)  # fmt: skip
PLACED = (Setting(layers=(0, 1), techniques=techniques("fp32", "none")
                  | {"expert-placement": {"slots": [[0, 1], [2, 3]]}}),)  # fmt: skip
UNFUSED = (
    Setting(
        layers=(0, 1), techniques=techniques("fp32", "none") | {"attention": {"kernel": "unfused"}}
    ),
)
PARAMETERS = (
    Setting(
        layers=(0, 1),
        techniques=techniques("fp32", "none") | {"offload": {"states": "parameters"}},
    ),
)
MIXED = (
    Setting(layers=(0, 0), techniques=techniques("fp32", "none")),
    Setting(layers=(1, 1), techniques=techniques("bf16", "none")),
)


@pytest.mark.parametrize(
    ("field", "plan"),
    [
        ("layers.bias", make_plan(msgspec.structs.replace(
            MODEL, layers=(msgspec.structs.replace(LAYER, experts=EXPERTS, bias=True),)))),
        ("layers.qkv_bias", make_plan(msgspec.structs.replace(
            MODEL, layers=(msgspec.structs.replace(LAYER, latent=LATENT, qkv_bias=True),)))),
        ("offload.states", make_plan(settings=HOSTED)),
        ("expert-placement.slots", make_plan(MOE, settings=PLACED)),
        ("positions", make_plan(msgspec.structs.replace(MODEL, positions="alibi"))),
        ("seq-len", make_plan(msgspec.structs.replace(GPT, max_positions=4))),
        ("precision", make_plan(settings=FP16)),
        ("precision", make_plan(settings=MIXED)),
        ("settings.techniques", make_plan(settings=UNFUSED)),
        ("offload", make_plan(settings=PARAMETERS)),
        ("orders", make_plan(orders={"0": ("0F0",)})),
        ("mesh", make_plan(mesh=Mesh(cp=2))),
        ("zero", make_plan(mesh=Mesh(dp_shard=2))),
    ],
)  # fmt: skip
def test_refused_with_the_reason(field: str, plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        check_supported(plan)
    if field not in ("mesh", "zero"):
        assert caught.value.field == field
    assert caught.value.remedy


LATENT_MODEL = msgspec.structs.replace(
    MODEL, layers=(msgspec.structs.replace(LAYER, latent=LATENT),)
)


@pytest.mark.parametrize("model", [MOE, LATENT_MODEL], ids=["experts", "latent"])
@pytest.mark.parametrize(
    ("field", "technique", "workload"),
    [
        ("lengths", {}, {"lengths": Lengths.of("two", [4, 8], "typed in")}),
        ("precision.compute", {"precision": {"compute": "fp8", "recipe": "coat"}}, {}),
        ("precision.activations", {"precision": {"compute": "bf16", "activations": "fp8"}}, {}),
    ],
)
def test_what_experts_and_latent_attention_do_not_run_beside(
    model: Model, field: str, technique: dict[str, Any], workload: dict[str, Any]
) -> None:
    settings = (Setting(layers=(0, 1), techniques=techniques("fp32", "none") | technique),)
    plan = make_plan(model, settings=settings)
    job = msgspec.structs.replace(plan.workload, **workload)
    with pytest.raises(InputError, match=r"routed experts|latent attention") as caught:
        check_supported(msgspec.structs.replace(plan, workload=job))
    assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize(
    ("field", "model", "recompute", "optimizer"),
    [
        ("optimizer", MOE, "none", "adamw_fp8"),
        ("recompute", LATENT_MODEL, "full_keep_attn", "adamw"),
    ],
)
def test_what_either_does_not_run_with(
    field: str, model: Model, recompute: str, optimizer: Optimizer
) -> None:
    plan = make_plan(model, recompute)
    job = msgspec.structs.replace(plan.workload, optimizer=optimizer)
    with pytest.raises(InputError) as caught:
        check_supported(msgspec.structs.replace(plan, workload=job))
    assert caught.value.field == field and caught.value.remedy


def test_hosted_moments_are_those_of_adamw() -> None:
    plan = make_plan(MOE, settings=HOSTED)
    job = msgspec.structs.replace(plan.workload, optimizer="sgd")
    with pytest.raises(InputError, match="moves fp32 moments of adamw, not those of sgd"):
        check_supported(msgspec.structs.replace(plan, workload=job))


@pytest.mark.parametrize("model", [MOE, LATENT_MODEL], ids=["experts", "latent"])
def test_experts_and_latent_attention_do_not_share_sequences(model: Model) -> None:
    cluster = load_cluster("2xcpu")
    stages = even_stages(2, 1, cluster.pools[0].name)
    plan = make_plan(model, mesh=Mesh(cp=2), stages=stages)
    with pytest.raises(InputError, match="do not share sequences") as caught:
        check_supported(msgspec.structs.replace(plan, cluster=cluster))
    assert caught.value.field == "cp" and caught.value.remedy


def test_what_checkpoints_do_not_keep_is_refused() -> None:
    placed = {"expert-placement": {"slots": [[0, 2], [1, 3]]}}
    settings = (Setting(layers=(0, 1), techniques=techniques("fp32", "none") | placed),)
    with pytest.raises(InputError) as caught:
        check_kept(make_plan(MOE, settings=settings))
    assert (caught.value.field, caught.value.value) == ("checkpoint", "expert-placement")
    check_kept(make_plan(MOE))


@pytest.mark.parametrize(
    ("field", "kind", "mesh"),
    [
        ("ulysses", "ulysses", Mesh(cp=3, ulysses=3)),  # of four heads
        ("cp-kind", "lightseq", Mesh(cp=3)),  # ranks help each other in pairs
        ("cp-kind", "spiral", Mesh(cp=2)),
        ("cp", "zigzag", Mesh(cp=8)),  # 24 tokens make no 16 chunks
    ],
)
def test_sequences_that_cannot_be_shared_so(field: str, kind: str, mesh: Mesh) -> None:
    cluster = load_cluster(f"{mesh.world}xcpu")
    shared = techniques("fp32", "none") | {"context-parallel": {"kind": kind}}
    chosen = (Setting(layers=(0, 1), techniques=shared),)
    plan = make_plan(mesh=mesh, settings=chosen, seq_tokens=24)
    phase = msgspec.structs.replace(plan.phase, stages=even_stages(2, 1, cluster.pools[0].name))
    with pytest.raises(InputError) as caught:
        check_supported(msgspec.structs.replace(plan, cluster=cluster, phases=(phase,)))
    assert caught.value.field == field and caught.value.remedy
