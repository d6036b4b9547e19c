"""Prices per GPU and hour, from a table of the user's own or from the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from ...catalogs import load_hardware
from ...catalogs.loader import resolve_name, suggest
from ...cluster import Cluster
from ...errors import InputError
from ..csv_rows import amount, check_header, read_rows

COLUMNS = ("gpu", "usd_per_hour")


def read_prices(path: str | Path, own: Iterable[str] = ()) -> dict[str, float]:
    """USD per device and hour by device name, from a CSV file with the columns of `COLUMNS`.

    A gpu is a catalog name or alias, or one of `own`, the devices of the user's own clusters.
    Raises InputError for a name that is neither, one that stands twice, or a price that is not
    positive.
    """
    table = read_rows(path)
    check_header(table, COLUMNS)
    at, priced = table.header.index("gpu"), table.header.index("usd_per_hour")
    known = set(own)
    prices: dict[str, float] = {}
    for number, cells in enumerate(table.rows, start=1):
        name = cells[at]
        if name not in known:
            if resolve_name("hardware", name) is None:
                raise suggest("hardware", f"row {number} gpu", name or "(empty)")
            name = load_hardware(name).device.name
        price = amount(cells[priced], "usd_per_hour", number)
        if price <= 0:
            raise InputError(f"row {number} usd_per_hour", cells[priced],
                             "a price is more than zero", "correct the cell")  # fmt: skip
        if name in prices:
            raise InputError(f"row {number} gpu", cells[at], f"{name} has a price already",
                             "give one row per gpu")  # fmt: skip
        prices[name] = price
    return prices


def with_prices(cluster: Cluster, prices: Mapping[str, float]) -> Cluster:
    """The cluster with the prices of its devices; those not in the table keep their own."""
    pools = tuple(
        msgspec.structs.replace(
            pool, price_usd_per_hour=prices.get(pool.device.name, pool.price_usd_per_hour)
        )
        for pool in cluster.pools
    )
    return msgspec.structs.replace(cluster, pools=pools)


def check_prices(clusters: Iterable[Cluster], needed: bool) -> None:
    """Raise InputError for a price that is not positive, or where one is needed and not known."""
    for pool in (pool for cluster in clusters for pool in cluster.pools):
        price = pool.price_usd_per_hour
        if price is None and needed:
            raise InputError("prices", pool.device.name, "no price is known",
                             "give --prices FILE with the columns gpu,usd_per_hour")  # fmt: skip
        if price is not None and not 0 < price < float("inf"):
            raise InputError("price_usd_per_hour", price, f"{pool.device.name} has no such price",
                             "give more than zero")  # fmt: skip
