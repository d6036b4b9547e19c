"""Documents: frozen, validated values that are read from and written to JSON or TOML.

A document names its schema and major version (`forerun.plan/1`). Unknown keys are refused, a newer
major version is refused, and reading one never executes code. Files are written under a temporary
name and renamed, so that a full disk or Ctrl-C leaves the old file or none, never half of one.
"""

from __future__ import annotations

import errno
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import msgspec

from .errors import InputError, RunFailed


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a document."""


class Document(Value, frozen=True, kw_only=True):
    """A value that stands in a file of its own; subclasses set `SCHEMA` and a `schema` field."""

    SCHEMA: ClassVar[str] = ""


V = TypeVar("V", bound=Value)


def _check_schema(kind: type[Value], raw: object, source: str) -> None:
    expected = getattr(kind, "SCHEMA", "")
    if not expected or not isinstance(raw, dict):
        return
    found = cast("dict[str, Any]", raw).get("schema", expected)
    name, _, version = str(found).partition("/")
    expected_name, _, expected_version = expected.partition("/")
    if name != expected_name:
        raise InputError("schema", found, f"{source} is not a {expected_name} document",
                         f"give a file whose schema is {expected}")  # fmt: skip
    if not version.isdigit():
        raise InputError("schema", found, f"the version in {source} is not a number",
                         f"write {expected}")  # fmt: skip
    if int(version) > int(expected_version):
        raise InputError("schema", found, f"{source} was written by a newer forerun",
                         f"upgrade forerun (this one reads up to {expected})")  # fmt: skip


def from_raw(kind: type[V], raw: object, source: str) -> V:
    """`raw` (dicts, lists, numbers) as a validated `kind`; raises InputError naming the path."""
    _check_schema(kind, raw, source)
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, ValueError) as error:
        message, _, where = str(error).partition(" - at ")
        field = where.strip("`") or "$"
        raise InputError(field, source, message, "correct the field, or write the file anew") from (
            error
        )


def from_json(kind: type[V], data: bytes, source: str) -> V:
    """JSON bytes as a validated `kind`."""
    return from_raw(kind, parse_json(data, source), source)


def parse_json(data: bytes, source: str) -> Any:
    """JSON bytes as plain values; a truncated or malformed text is an InputError."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("file", source, f"not valid JSON ({error})",
                         "check that the file is whole") from error  # fmt: skip


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file the user named; any failure to read is an InputError."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError("file", path, reason, "give a file that exists and is readable") from error


def read_raw(path: str | Path) -> Any:
    """A JSON or TOML file as plain values; the ending decides (`.toml`, otherwise JSON)."""
    data = read_bytes(path)
    if Path(path).suffix == ".toml":
        try:
            return tomllib.loads(data.decode("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError("file", path, f"not valid TOML ({error})",
                             "check that the file is whole") from error  # fmt: skip
    return parse_json(data, str(path))


def read(kind: type[V], path: str | Path) -> V:
    """The document in a JSON or TOML file."""
    return from_raw(kind, read_raw(path), str(path))


def to_raw(value: object) -> Any:
    """Plain dicts, lists and numbers, ready for JSON."""
    return msgspec.to_builtins(value)


def to_json(value: object, indent: int = 2) -> bytes:
    """JSON text of a value, ending in a newline; the same value always gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=indent) + b"\n"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name in the same folder, flush, rename."""
    target = Path(path)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "give a writable place"
        raise RunFailed(f"file={target}: cannot write ({error.strerror or error}); {hint}") from (
            error
        )
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write(path: str | Path, value: Value) -> None:
    """Write a document as JSON, or as TOML when the name ends in `.toml`."""
    if Path(path).suffix == ".toml":
        import tomli_w

        raw = msgspec.to_builtins(value, str_keys=True)
        write_bytes(path, tomli_w.dumps(_without_none(raw)).encode())
    else:
        write_bytes(path, to_json(value))


def _without_none(raw: Any) -> Any:
    if isinstance(raw, dict):
        items = cast("dict[str, Any]", raw).items()
        return {key: _without_none(item) for key, item in items if item is not None}
    if isinstance(raw, (list, tuple)):
        return [_without_none(item) for item in cast("list[Any]", raw)]
    return raw
