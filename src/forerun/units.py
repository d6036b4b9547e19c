"""Sizes as people write them (`8192`, `128k`, `4Mtok`); bytes and seconds as people read them."""

from __future__ import annotations

import re

from .errors import InputError

GIB = 1024**3
MIB = 1024**2

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", re.IGNORECASE)
_BATCH = re.compile(r"(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g)?tok", re.IGNORECASE)


def _positive_int(field: str, text: str, number: float) -> int:
    value = round(number)
    if value < 1 or abs(value - number) > 1e-6 * max(1.0, number):
        raise InputError(field, text, "not a positive whole number", "give 1 or more")
    return value


def parse_tokens(text: str, field: str = "seq-len") -> int:
    """A sequence length in tokens; `k` and `M` are binary here, as the field writes contexts.

    >>> parse_tokens("8192"), parse_tokens("128k"), parse_tokens("1M")
    (8192, 131072, 1048576)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(field, text, "not a length", "write 8192, 128k or 1M")
    scale = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
    unit = (match.group(2) or "").lower().removesuffix("i")
    return _positive_int(field, text, float(match.group(1)) * scale[unit])


def parse_batch(text: str, seq_tokens: int, field: str = "global-batch") -> int:
    """A global batch in whole sequences: `64` counts sequences, `4Mtok` tokens (decimal M).

    >>> parse_batch("64", 8192), parse_batch("4Mtok", 8192), parse_batch("4Mitok", 8192)
    (64, 488, 512)
    """
    match = _BATCH.fullmatch(text.strip())
    if match is not None:
        scale = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
        tokens = float(match.group(1)) * scale[(match.group(2) or "").lower()]
        return max(1, _positive_int(field, text, max(1, round(tokens / seq_tokens))))
    if not re.fullmatch(r"\d+", text.strip()):
        raise InputError(field, text, "not a batch", "write sequences (64) or tokens (4Mtok)")
    return _positive_int(field, text, float(text))


def parse_bytes(field: str, text: str) -> int:
    """A size in bytes as people write it.

    >>> parse_bytes("host-memory", "64GiB"), parse_bytes("host-memory", "1.5kB")
    (68719476736, 1500)
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise InputError(field, text, "not a size", "write bytes (1048576), 200MiB or 80GB")
    power = " kmgt".index(match[2] or " ")
    size = float(match[1]) * (1024.0 if match[3] else 1000.0) ** power
    if size < 1:
        raise InputError(field, text, "not a positive size", "give 1 byte or more")
    return int(size)


def parse_rate(field: str, text: str) -> float:
    """A link's rate in bytes per second as people write it, in bits or bytes.

    >>> parse_rate("link-rate", "100Mbit/s"), parse_rate("link-rate", "1.5GB/s")
    (12500000.0, 1500000000.0)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmg]?)(bit|b)/s", text.strip().lower())
    rate = 0.0
    if match is not None:
        scale = 1000.0 ** " kmg".index(match[2] or " ")
        rate = float(match[1]) * scale / (8 if match[3] == "bit" else 1)
    if rate < 1:
        raise InputError(field, text, "not a rate", "write 100Mbit/s, 10Gbit/s or 1.2GB/s")
    return rate


def format_rate(bytes_per_s: float) -> str:
    """A link's rate for people, in bits.

    >>> format_rate(12.5e6), format_rate(50e9)
    ('100 Mbit/s', '400 Gbit/s')
    """
    bits = bytes_per_s * 8
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"


def parse_duration(text: str, field: str) -> float:
    """A duration in seconds; the unit is always written.

    >>> parse_duration("90s", "until"), parse_duration("1.5h", "until")
    (90.0, 5400.0)
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = 0.0
    if match is not None:
        scale = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
        seconds = float(match.group(1)) * scale[match.group(2).lower()]
    if seconds <= 0:
        raise InputError(field, text, "not a duration", "write 90s, 30m, 2h or 1d")
    return seconds


def format_bytes(num_bytes: float) -> str:
    """Memory for people: GiB, or MiB and KiB below one.

    >>> format_bytes(3 * 1024**3), format_bytes(5 * 1024**2), format_bytes(100)
    ('3.00 GiB', '5.0 MiB', '100 B')
    """
    if abs(num_bytes) >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    if abs(num_bytes) >= MIB:
        return f"{num_bytes / MIB:.1f} MiB"
    if abs(num_bytes) >= 1024:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """A duration for people.

    >>> format_seconds(1.5), format_seconds(0.0125), format_seconds(2e-5)
    ('1.500 s', '12.5 ms', '20.0 us')
    """
    if abs(seconds) >= 1:
        return f"{seconds:.3f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us"
