"""The corpus: the standard library by default, or the user's text or JSONL; never nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forerun.errors import InputError
from forerun.executors import corpus
from forerun.model import Layer, Model


def model(vocab: int) -> Model:
    layer = Layer(repeat=1, heads=2, kv_heads=2, head_dim=4, ffn_hidden=8)
    return Model(name="toy", hidden=8, vocab=vocab, layers=(layer,))


def test_standard_library_is_real_text_and_stable() -> None:
    text = corpus.load(None, limit_bytes=200_000)
    assert len(text) == 200_000
    assert b"import " in text and b"def " in text
    assert text == corpus.load(None, limit_bytes=200_000)


def test_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "skip.bin").write_bytes(b"\0\1")
    assert corpus.load(str(tmp_path / "a.txt")) == b"first\n"
    assert corpus.load(str(tmp_path)) == b"first\nsecond\n"


def test_jsonl_takes_the_text_field(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one", "zwölf")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    assert corpus.load(str(tmp_path / "data.jsonl")) == "one\nzwölf\n".encode()


@pytest.mark.parametrize("line", ['{"body": "x"}', "[1]", "{broken"])
def test_jsonl_without_text_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        corpus.load(str(path))


def test_missing_empty_and_blank_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "folder").mkdir()
    for name in ("nowhere", "empty.txt", "blank.txt", "folder"):
        with pytest.raises(InputError) as caught:
            corpus.load(str(tmp_path / name))
        assert caught.value.field == "data" and name in str(caught.value)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: act as nobody where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with without_privileges(), pytest.raises(InputError, match="Permission denied"):
        corpus.load(str(path))


def test_folder_given_as_jsonl_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "loop.txt"
    broken.symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="data="):
        corpus.load(str(broken))


def test_small_vocabulary_and_short_text_are_refused() -> None:
    with pytest.raises(InputError, match=r"vocab=255.*256"):
        corpus.check_fits(b"x" * 100, model(255), 10, None)
    with pytest.raises(InputError, match="holds 10 bytes, a sequence takes 11"):
        corpus.check_fits(b"x" * 10, model(256), 10, "short.txt")
    corpus.check_fits(b"x" * 11, model(256), 10, "enough.txt")
