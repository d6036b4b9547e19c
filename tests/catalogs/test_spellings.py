"""What people write for --gpus, and what is said about it."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun import document
from forerun.catalogs import (
    load_cluster,
    load_hardware,
    load_model,
    load_user_profile,
    resolve_gpus,
    save_user_profile,
    sizes,
    spellings,
    user_profile_path,
)
from forerun.cluster import Profile
from forerun.errors import InputError


def profile(device: str = "cpu") -> Profile:
    return Profile(name="measured", device=device, date="2026-11-23", environment={})


def test_doctests() -> None:
    assert doctest.testmod(spellings).failed == 0
    assert doctest.testmod(sizes).failed == 0


@pytest.mark.parametrize(
    ("spec", "device", "nodes", "per_node"),
    [
        ("8xH100", "H100-SXM-80GB", 1, 8),
        ("4XH100", "H100-SXM-80GB", 1, 4),
        ("16xh100", "H100-SXM-80GB", 2, 8),
        ("H100:8", "H100-SXM-80GB", 1, 8),
        ("h100-pcie:2", "H100-PCIe-80GB", 1, 2),
        ("384x8xA100-80GB", "A100-SXM-80GB", 384, 8),
        ("2x4xa100_40gb", "A100-SXM-40GB", 2, 4),
        ("2 x 8 x A100-SXM-40GB", "A100-SXM-40GB", 2, 8),
        ("8xMI300X", "MI300X-192GB", 1, 8),
        ("2x3090", "RTX3090-24GB", 1, 2),
        ("2048x8xH100", "H100-SXM-80GB", 2048, 8),
        ("72xGB200", "GB200-NVL72", 1, 72),
        ("18x4xGB200", "GB200-NVL72", 1, 72),
        ("256xGB200", "GB200-NVL72", 4, 64),
        ("B200", "B200-HGX", 1, 1),
    ],
)
def test_gpus(spec: str, device: str, nodes: int, per_node: int) -> None:
    cluster = load_cluster(spec)
    (pool,) = cluster.pools
    assert (pool.device.name, pool.num_nodes, pool.devices_per_node) == (device, nodes, per_node)
    assert cluster.num_devices == nodes * per_node
    assert pool.shared_cores is None


def test_what_was_decided_is_said() -> None:
    assert resolve_gpus("8xH100").notes == ("H100 -> H100-SXM-80GB",)
    assert resolve_gpus("8xh100-sxm-80gb").notes == ()
    assert resolve_gpus("16xH100-SXM-80GB").notes == ("16 devices -> 2 nodes of 8",)
    assert any("64 in use" in note for note in resolve_gpus("256xGB200").notes)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_this_machine(processes: int) -> None:
    (pool,) = load_cluster(f"{processes}xcpu").pools
    assert (pool.num_nodes, pool.devices_per_node) == (1, processes)
    assert pool.device.kind == "cpu"
    assert pool.device.memory_bytes == load_hardware("cpu").device.memory_bytes // processes
    assert pool.shared_cores is not None and 1 <= pool.shared_cores <= (os.cpu_count() or 1)
    assert pool.stack.name == "gloo-cpu"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "^gpus=.*not a number of devices"),
        ("8x", "not a number of devices"),
        ("0xH100", "0 devices; give 1"),
        ("-8xH100", "-8 devices; give 1"),
        ("H100:0", "0 devices; give 1"),
        ("0x8xH100", "0 nodes; give 1"),
        ("2x0xH100", "0 GPUs per node"),
        ("8.5xH100", "not a number of devices"),
        ("8xH1000", "unknown name; did you mean"),
        ("8xcpus", "did you mean cpu"),
        ("8xzzzzzz", "unknown name; known: "),
        ("12xH100", "do not fill nodes of 8; use 8 or 16"),
        ("2x16xH100", "node has 8 devices"),
        ("75xGB200", "multiple of 4"),
        ("99999999999999999999xH100", "give 1 to 1000000"),
        ("absent.toml", "^file=absent.toml: No such file"),
        ("some/where", "^file=some/where: No such file"),
    ],
)
def test_bad_gpus(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_gpus(spec)


@given(st.text(alphabet="0123456789xX:*-. aAhH1gGbBcpu", max_size=12))
def test_any_text_is_resolved_or_refused(text: str) -> None:
    for resolve in (resolve_gpus, load_model):
        try:
            resolve(text)
        except InputError as error:
            assert "\n" not in str(error)


def test_another_stack() -> None:
    assert load_cluster("8xH100", stack="megatron").pools[0].stack.name == "megatron-h100"
    with pytest.raises(InputError, match=r"^stack=megatrom: unknown name; did you mean"):
        load_cluster("8xH100", stack="megatrom")


def test_cluster_document(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    document.write(path, load_cluster("16xA100"))
    resolved = resolve_gpus(str(path))
    assert resolved.cluster == load_cluster("16xA100")
    assert load_cluster(str(path), stack="megatron").pools[0].stack.name == "megatron-a100"


def test_cluster_document_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    document.write(path, load_model("tiny"))
    with pytest.raises(InputError, match=r"not a forerun.cluster document"):
        resolve_gpus(str(path))


def test_the_users_profile_is_attached(user_folder: Path) -> None:
    assert load_user_profile("cpu") is None
    assert load_cluster("2xcpu").profile is None
    path = save_user_profile(profile())
    assert path == user_profile_path("cpu") == user_folder / "profiles" / "cpu.json"
    assert load_user_profile("cpu") == profile()
    resolved = resolve_gpus("2xcpu")
    assert resolved.cluster.profile == profile()
    assert resolved.notes == ("profile measured of 2026-11-23",)
    assert load_cluster("8xH100").profile is None


def test_a_given_profile_comes_first(tmp_path: Path) -> None:
    save_user_profile(profile())
    given = Profile(name="given", device="cpu", date="2026-01-01", environment={})
    assert load_cluster("2xcpu", profile=given).profile == given
    path = tmp_path / "c.json"
    document.write(path, load_cluster("2xcpu", profile=given))
    assert load_cluster(str(path)).profile == given


def test_a_profile_of_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="was measured on cpu, not H100-SXM-80GB"):
        load_cluster("8xH100", profile=profile())


def test_device_names_make_safe_file_names(user_folder: Path) -> None:
    path = user_profile_path("../NVIDIA H100 / 80GB")
    assert path.parent == user_folder / "profiles"
    assert path.name == "nvidia-h100-80gb.json"


def test_a_broken_profile_is_named(user_folder: Path) -> None:
    path = save_user_profile(profile())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cpu\.json: not valid JSON"):
        load_cluster("2xcpu")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "^model=.*no model"),
        ("lama-2-7b", "did you mean llama-2-7b"),
        ("package.module:function", "tracing a module is not available yet"),
        ("nowhere/config.json", "^file=nowhere/config.json"),
        ("meta-llama/Llama-3.1-8B", "no such file; llama-3.1-8b is in the catalog"),
        ("0b", "not a parameter count"),
        ("1m", "no decoder with vocabulary 32000"),
    ],
)
def test_bad_models(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(spec)


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_model_document(ending: str, tmp_path: Path) -> None:
    document.write(tmp_path / f"m.{ending}", load_model("deepseek-v3"))
    assert load_model(str(tmp_path / f"m.{ending}")) == load_model("deepseek-v3")


def test_a_folder_does_not_hide_a_catalog_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-1m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny-1m").name == "tiny-1m"
