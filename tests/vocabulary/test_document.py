"""Documents: what is written reads back, and what is broken is refused in one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forerun import document
from forerun.cluster import Cluster, Device, Link, Pool
from forerun.errors import InputError, RunFailed
from forerun.model import Model
from forerun.plan import Plan
from forerun.stack import Stack
from forerun.workload import Workload

from .strategies import models

MODEL = document.from_raw(
    Model,
    {
        "name": "m",
        "hidden": 8,
        "vocab": 9,
        "layers": [{"repeat": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn_hidden": 7}],
    },
    "test",
)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@given(models)
def test_json_round_trip(model: Model) -> None:
    text = document.to_json(model)
    assert document.from_json(Model, text, "test") == model
    assert document.to_json(document.from_json(Model, text, "test")) == text


@pytest.mark.parametrize("ending", ["json", "toml"])
@same_folder
@given(model=models)
def test_file_round_trip(model: Model, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{ending}"
    document.write(path, model)
    assert document.read(Model, path) == model
    assert not list(tmp_path.glob(".model*"))


def test_cluster_round_trip_keeps_none_and_tuples(tmp_path: Path) -> None:
    device = Device(
        name="d",
        kind="gpu",
        memory_bytes=2**35,
        memory_bytes_per_s=1e12,
        peak_flops_per_s={"bf16": 1e14},
        capability=(9, 0),
    )
    pool = Pool(
        name="p",
        device=device,
        devices_per_node=8,
        intra_node=Link(latency_s=1e-6, bytes_per_s=1e11),
        stack=Stack(name="s", gemm_efficiency={"bf16": 0.7}),
    )
    cluster = Cluster(name="c", pools=(pool,))
    for ending in ("json", "toml"):
        document.write(tmp_path / f"c.{ending}", cluster)
        assert document.read(Cluster, tmp_path / f"c.{ending}") == cluster


@given(models, st.data())
def test_every_truncation_is_refused(model: Model, data: st.DataObject) -> None:
    text = document.to_json(model)
    cut = data.draw(st.integers(0, len(text) - 3))  # the last bytes are a brace and a newline
    with pytest.raises(InputError) as caught:
        document.from_json(Model, text[:cut], "cut.json")
    assert "cut.json" in one_line(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":\x00}', b"nul"])
def test_malformed_json(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not valid JSON"):
        document.read(Model, path)


@pytest.mark.parametrize("data", [b"a = ", b"\xff", b"a = " + b"[" * 100_000, b"a = 1\na = 2"])
def test_malformed_toml(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not valid TOML"):
        document.read(Model, path)


@pytest.mark.parametrize("path", ["absent.json", "a\0b.json", "."])
def test_unreadable_files(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^file="):
        document.read(Model, path)


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"hiden": 8}, "$", "unknown field `hiden`"),
        ({"layers": [{"repeat": 1, "width": 3}]}, r"$.layers[0]", "unknown field `width`"),
        ({"hidden": "8"}, "$.hidden", "Expected `int`, got `str`"),
        ({"hidden": 8.5}, "$.hidden", "Expected `int`, got `float`"),
        ({"positions": "rotary"}, "$.positions", "Invalid enum value 'rotary'"),
        ({"layers": 3}, "$.layers", "Expected `array`, got `int`"),
        ({"schema": "forerun.model/2"}, "schema", "newer forerun"),
        ({"schema": "forerun.plan/1"}, "schema", "not a forerun.model document"),
        ({"schema": "forerun.model/one"}, "schema", "not a number"),
        ({"schema": 1}, "schema", "not a forerun.model document"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, object], field: str, problem: str) -> None:
    raw = {**document.to_raw(MODEL), **change}
    with pytest.raises(InputError) as caught:
        document.from_json(Model, json.dumps(raw).encode(), "m.json")
    assert caught.value.field == field
    assert problem in one_line(caught.value)


@pytest.mark.parametrize("missing", ["name", "hidden", "layers"])
def test_missing_fields_are_named(missing: str) -> None:
    raw = document.to_raw(MODEL)
    del raw[missing]
    with pytest.raises(InputError, match=f"missing required field `{missing}`"):
        document.from_raw(Model, raw, "m.json")


def test_an_lm_head_needs_a_vocabulary() -> None:
    raw = document.to_raw(MODEL)
    del raw["vocab"]
    with pytest.raises(InputError, match=r"vocab.*needs 1 or more"):
        document.from_raw(Model, raw, "m.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.sampled_from([Model, Cluster, Plan, Workload]), st.data())
def test_any_value_in_any_field_is_read_or_refused(
    kind: type[document.Document], data: st.DataObject
) -> None:
    fields = st.sampled_from(kind.__struct_fields__)
    raw = data.draw(st.dictionaries(fields, json_values, max_size=4))
    try:
        value = document.from_raw(kind, raw, "any")
    except InputError as error:
        one_line(error)
    else:
        assert document.from_raw(kind, document.to_raw(value), "any") == value


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.json"
    document.write(path, MODEL)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(document.os, "fsync", full)
    with pytest.raises(RunFailed, match=r"m\.json: cannot write .*free some space"):
        document.write(path, MODEL)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*m.json*")] == ["m.json"]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(document.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        document.write(tmp_path / "out" / "m.json", MODEL)
    assert list((tmp_path / "out").iterdir()) == []


def test_write_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="cannot write"):
        document.write(tmp_path / "file" / "m.json", MODEL)
