"""Catalog models: their parameter counts against published ones."""

from __future__ import annotations

import pytest

from forerun.catalogs import load_model, names
from forerun.catalogs.loader import ROOT, resolve_name
from forerun.document import read_raw
from forerun.model import Model

EXACT = {  # parameters of the published weights
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "vit-b-16": 86_567_656,
    "vit-l-16": 304_326_632,
    "vit-h-14": 632_045_800,
    "clip-vit-l-14": 427_616_513,
    "resnet-50": 25_557_032,
    "resnet-101": 44_549_160,
    "resnet-152": 60_192_808,
}

ROUNDED = {  # 1e9 parameters as their papers or tables print them, and how far rounding goes
    "deepseek-v3": (671.0, 0.001),
    "gpt3-175b": (174.6, 0.001),
    "megatron-1t": (1008.0, 0.001),
    "gpt-3.6b": (3.6, 0.02),
    "gpt-18.4b": (18.4, 0.005),
    "gpt-39.1b": (39.1, 0.005),
    "gpt-76.1b": (76.1, 0.005),
    "gpt-310.1b": (310.1, 0.005),
    "gpt-529.6b": (529.6, 0.005),
    "gpt-22b": (22.0, 0.01),
    "gpt-1.7b": (1.7, 0.03),
    "gpt-16b": (16.0, 0.01),
    "gpt-70b": (70.0, 0.01),
    "gpt-177b": (177.0, 0.01),
    "gpt-462b": (462.0, 0.01),
    "gpt-h1024-l24": (0.355, 0.01),
    "gpt-h2048-l12": (0.709, 0.01),
    "gpt3-1.3b": (1.31, 0.02),
    "gpt3-2.7b": (2.65, 0.02),
    "gpt3-20b": (20.25, 0.005),
    "gpt-oss-120b": (116.8, 0.002),
    "qwen3-30b-a3b": (30.53, 0.001),
    "qwen3-235b-a22b": (235.1, 0.001),
    "llama-30b": (32.53, 0.001),
    "llama3.1-405b-l7": (26.52, 0.001),
    "llama3.1-405b-l42": (138.09, 0.001),
    "llama-like-1.34b": (1.34, 0.005),
    "llama-like-3.57b": (3.57, 0.005),
    "llama-like-8.86b": (8.86, 0.005),
    "llama-like-80b": (80.0, 0.005),
    "mpt-125m": (0.1253, 0.001),
    "mpt-350m": (0.356, 0.001),
    "mpt-760m": (0.7605, 0.001),
    "mpt-1b": (1.316, 0.001),
    "mpt-3b": (2.6518, 0.001),
    "mpt-7b": (6.6589, 0.001),
    "mpt-13b": (12.854, 0.001),
    "mpt-30b": (29.9752, 0.001),
    "mpt-70b": (64.8624, 0.001),
    "nemotron3-8b": (8.54, 0.005),
    "nemotron3-22b": (21.3, 0.005),
    "nemotron4-15b": (15.63, 0.005),
    "nemotron4-340b": (341.0, 0.001),
    "phi-1.5": (1.418, 0.001),
    "dit-b-2": (0.130, 0.005),
    "dit-l-2": (0.458, 0.001),
    "dit-xl-2": (0.675, 0.001),
    "stablelm-alpha": (3.64, 0.005),
}

TINY = {
    "tiny-1m": 1e6, "tiny-3m": 3e6, "tiny-6m": 6e6, "tiny-25m": 25e6, "tiny-moe-4m": 4e6,
    "tiny-mla-moe-2m": 2e6,
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_published_weights_to_the_last_parameter(name: str) -> None:
    assert load_model(name).num_params == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_published_counts(name: str) -> None:
    billions, tolerance = ROUNDED[name]
    assert load_model(name).num_params == pytest.approx(billions * 1e9, rel=tolerance)


@pytest.mark.parametrize("name", TINY)
def test_tiny_family(name: str) -> None:
    model = load_model(name)
    assert model.num_params == pytest.approx(TINY[name], rel=0.2)
    assert (model.vocab, model.tied_embeddings, model.positions) == (256, False, "rope")
    layer = model.layers[-1]
    values = layer.head_dim if layer.latent is None else layer.latent.v_head_dim
    assert layer.heads * values == model.hidden
    assert all(size % 2 == 0 for size in (layer.heads, layer.kv_heads, *layer.mlp_widths))


@pytest.mark.parametrize("name", names("models"))
def test_every_document(name: str) -> None:
    model = load_model(name.upper())
    assert model.name == name
    assert model.source
    tested = {*EXACT, *ROUNDED, *TINY}
    shape = (model.hidden, model.num_layers)
    assert name in tested or shape in {_shape(other) for other in tested} or "gpt-h" in name


def _shape(name: str) -> tuple[int, int]:
    model = load_model(name)
    return model.hidden, model.num_layers


def test_mixture_of_layers_keeps_its_order() -> None:
    model = load_model("deepseek-v3")
    assert [model.layer_at(i).experts is None for i in (0, 2, 3, 60)] == [True, True, False, False]
    assert model.num_layers == 61


@pytest.mark.parametrize("kind", ["models", "hardware", "stacks"])
def test_every_alias_leads_to_a_document(kind: str) -> None:
    for alias, name in read_raw(ROOT / "aliases.toml")[kind].items():
        assert resolve_name(kind, alias) == name
        assert name in names(kind)
        assert alias not in {known.lower() for known in names(kind)}, "an alias hides a document"


@pytest.mark.parametrize("spelling", ["llama3-8b", "LLaMA_3.1 8B", " llama-3.1-8b ", "Llama3.1-8b"])
def test_spellings_of_one_model(spelling: str) -> None:
    assert load_model(spelling) == load_model("llama-3.1-8b")


def test_documents_read_as_the_same_kind() -> None:
    assert isinstance(load_model("tiny"), Model)
