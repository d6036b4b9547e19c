"""`forerun catalog`: every document of every kind, as plain values."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from forerun.catalogs import KINDS, Lengths, entries, entry, load_model, names
from forerun.catalogs.loader import ROOT, resolve_name
from forerun.choices import CP_KINDS, RECOMPUTE_MODES, TENSORS
from forerun.document import read
from forerun.errors import InputError


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_plain_named_and_sorted(kind: str) -> None:
    found = entries(kind)
    listed = [item["name"] for item in found]
    assert listed == list(names(kind)) == sorted(listed, key=str.lower)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps([entry(kind, n) for n in listed]))
    assert all(item.get("source") or item.get("paper") for item in found)


def test_models_come_with_their_size() -> None:
    assert entry("models", "LLAMA3-8B")["num_params"] == 8_030_261_248


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("hardwares", "H100", "^catalog=hardwares: unknown name; did you mean hardware?"),
        ("models", "llama", "^name=llama: unknown name; did you mean"),
        ("techniques", "zeros", "did you mean zero"),
    ],
)
def test_unknown(kind: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        entry(kind, name)


def test_unknown_kind_of_entries() -> None:
    with pytest.raises(InputError, match=r"^catalog=nothing"):
        entries("nothing")


def test_techniques_name_the_settings_that_plans_use() -> None:
    assert set(entry("techniques", "recompute")["settings"]) == {*RECOMPUTE_MODES, TENSORS}
    assert set(entry("techniques", "context-parallel")["settings"]) == set(CP_KINDS)
    assert set(entry("techniques", "zero")["settings"]) == {"0", "1", "2", "3"}
    assert set(entry("techniques", "precision")["settings"]) == {"fp32", "bf16"}


def test_workloads_fit_their_models() -> None:
    for item in entries("workloads"):
        model = load_model(item["model"])
        assert model.max_positions is None or item["workload"]["seq_tokens"] <= model.max_positions


@pytest.mark.parametrize("name", names("lengths"))
def test_lengths_are_a_distribution(name: str) -> None:
    lengths = read(Lengths, ROOT / "lengths" / f"{name}.toml")
    assert len(lengths.quantiles) == len(lengths.lengths)
    assert lengths.quantiles[0] == 0 and lengths.quantiles[-1] == 1
    assert list(lengths.quantiles) == sorted(set(lengths.quantiles))
    assert list(lengths.lengths) == sorted(lengths.lengths)
    steps = zip(lengths.quantiles, lengths.quantiles[1:], strict=False)
    weights = [high - low for low, high in steps]
    low_mean = sum(w * size for w, size in zip(weights, lengths.lengths[:-1], strict=True))
    high_mean = sum(w * size for w, size in zip(weights, lengths.lengths[1:], strict=True))
    assert low_mean <= lengths.mean <= high_mean


def test_a_path_is_not_a_name() -> None:
    assert resolve_name("models", "../models/tiny-1m") is None


def test_loading_needs_no_heavy_package() -> None:
    code = (
        "import sys; from forerun.catalogs import load_cluster, load_model, entries;"
        "load_model('llama-3.1-8b'); load_cluster('8xH100'); load_model('7b'); entries('models');"
        "heavy = {'torch', 'scipy', 'numpy', 'networkx', 'pulp', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT.parents[1])}
    )
