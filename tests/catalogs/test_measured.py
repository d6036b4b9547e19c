"""Profiles that the catalog ships: used where the user measured none, on one node alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from forerun.catalogs import load_cluster, load_hardware, save_user_profile
from forerun.catalogs.profiles import SHIPPED, load_profile
from forerun.cluster import Profile
from forerun.costmodel.prices import Prices
from forerun.document import read

FILES = sorted(SHIPPED.glob("*.json"))


@pytest.fixture(autouse=True)
def empty_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_what_was_measured_where_and_when(path: Path) -> None:
    profile = read(Profile, path)
    assert profile.shipped and profile.date and profile.operators
    assert load_hardware(profile.device).device.name == profile.device
    assert {"driver_version", "clocks.sm", "power.limit", "torch"} <= set(profile.environment)
    assert load_profile(profile.device) == profile


def test_one_node_is_priced_with_it_and_says_catalog() -> None:
    cluster = load_cluster("1xH200")
    assert cluster.profile is not None and cluster.profile.shipped
    assert Prices(cluster.pools[0], cluster.profile).evidence == "catalog"
    assert load_cluster("2x8xH200").profile is None


def test_the_users_own_comes_first() -> None:
    shipped = load_cluster("1xH200").profile
    assert shipped is not None
    own = msgspec.structs.replace(shipped, name="mine", shipped=False)
    save_user_profile(own)
    assert load_cluster("1xH200").profile == own
    assert Prices(load_cluster("1xH200").pools[0], own).evidence == "measured"
