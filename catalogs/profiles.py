"""Measured profiles: the user's, one document per device in the user's data folder, and those that
the catalog ships for devices of which one was measured.

The folder is the platform's data folder of forerun; the environment variable FORERUN_DATA names
another. This is the only place that reads it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..cluster import Profile
from ..document import read, write

SHIPPED = Path(__file__).parent / "measured"


def user_data_folder() -> Path:
    """The folder of the user's own data; it need not exist yet."""
    override = os.environ.get("FORERUN_DATA")
    if override:
        return Path(override).expanduser()
    from platformdirs import user_data_path

    return user_data_path("forerun", appauthor=False)


def user_profile_path(device: str) -> Path:
    """Where the user's profile of a device stands, whether it is there or not."""
    stem = re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-.") or "device"
    return user_data_folder() / "profiles" / f"{stem}.json"


def load_user_profile(device: str) -> Profile | None:
    """The user's profile of a device; None when nothing was measured yet."""
    path = user_profile_path(device)
    return read(Profile, path) if path.exists() else None


def load_profile(device: str) -> Profile | None:
    """The user's profile of a device, or the catalog's; None where nobody measured one."""
    found = load_user_profile(device)
    if found is not None:
        return found
    path = SHIPPED / user_profile_path(device).name
    return read(Profile, path) if path.exists() else None


def save_user_profile(profile: Profile) -> Path:
    """Write the profile of its device, whole or not at all; returns where it stands."""
    path = user_profile_path(profile.device)
    write(path, profile)
    return path
