from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from dcnseg.files import (
    OUTPUT_MARKER,
    atomic_path,
    has_unmarked_files,
    is_output_folder,
    mark_output_folder,
    open_regular_file,
    read_json,
)


@pytest.mark.parametrize("is_durable", [True, False])
@pytest.mark.parametrize("name", ["file.png", "n" * 251 + ".png"])  # the longest name
def test_atomic_path_creates_only_the_final_file(
    tmp_path: Path, name: str, is_durable: bool
) -> None:
    target = tmp_path / "new" / "folder" / name
    with atomic_path(target, is_durable=is_durable) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        temporary.write_text("content")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == [name]
    assert target.read_text() == "content"
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "without content"):
        pass


def test_atomic_path_keeps_the_old_file_on_error(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "socket"))
    for name in ("fifo", "socket", "."):
        with pytest.raises(OSError, match=r"regular|No such device|directory"):
            open_regular_file(tmp_path / name)
    bound.close()
    (tmp_path / "file").write_bytes(b"x")
    with open_regular_file(tmp_path / "file") as file:
        assert file.read() == b"x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1', "delimiter"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 5000, "an integer of 5000 digits; the limit is 4300"),
        (b'["\\ud800"]', "unpaired surrogate"),
        (b'{"\\udfff": 1}', "unpaired surrogate"),
        (b"\xff", "utf-8"),
    ],
)
def test_invalid_json_is_an_error(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "file.json")


def test_json_with_byte_order_mark_surrogate_pairs_and_names_that_are_not_utf8(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(path) == {"a": "\U0001f600"}
    name = os.fsdecode(b"caf\xe9.png")
    path.write_text(json.dumps([name]))
    assert read_json(path, has_file_names=True) == [name]
    with pytest.raises(ValueError, match="unpaired surrogate"):
        read_json(path)


def test_marked_output_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    assert not is_output_folder(folder)
    mark_output_folder(folder)
    mark_output_folder(folder)
    assert is_output_folder(folder)
    assert not is_output_folder(folder.parent)
    assert has_unmarked_files(folder.parent)
    assert not has_unmarked_files(folder)
    assert not has_unmarked_files(tmp_path / "missing")


def test_folder_without_permission_is_no_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, **_settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    assert not is_output_folder(tmp_path)


def test_a_mark_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    with atomic_path(tmp_path / OUTPUT_MARKER) as temporary:
        temporary.touch()
        assert not has_unmarked_files(tmp_path)
        (tmp_path / ".other.tmp").touch()
        assert has_unmarked_files(tmp_path)
