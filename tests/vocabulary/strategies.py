"""Random vocabulary values for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from forerun.experts import Experts
from forerun.mesh import Mesh
from forerun.model import Layer, Model

sizes = st.integers(1, 64)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kv_heads = draw(st.integers(1, 8))
    num_experts = draw(sizes)
    experts = draw(
        st.none()
        | st.builds(
            Experts,
            num_experts=st.just(num_experts),
            top_k=st.integers(1, num_experts),
            ffn_hidden=sizes,
            shared_ffn_hidden=st.integers(0, 64),
            capacity_factor=st.none() | st.floats(0.5, 4),
        )
    )
    return Layer(
        repeat=draw(st.integers(1, 6)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(sizes),
        ffn_hidden=draw(sizes),
        mlp=draw(st.sampled_from(["swiglu", "gelu", "squared_relu"])),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        experts=experts,
    )


names = st.text(alphabet='aZ9-_.é" #[]\\\n', max_size=8)

models = st.builds(
    Model,
    name=names,
    hidden=sizes,
    vocab=sizes,
    layers=st.lists(layers(), min_size=1, max_size=3).map(tuple),
    tied_embeddings=st.booleans(),
    positions=st.sampled_from(["rope", "learned", "alibi", "none"]),
    max_positions=st.none() | sizes,
    rope_theta=st.floats(1, 1e7),
    source=names,
)

degrees = st.integers(1, 5)
meshes = st.builds(Mesh, pp=degrees, dp_replicate=degrees, dp_shard=degrees, cp=degrees, tp=degrees)
