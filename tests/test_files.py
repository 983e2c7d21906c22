from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from dcnseg.files import (
    atomic_path,
    has_unmarked_files,
    is_output_folder,
    mark_output_folder,
    open_regular_file,
    read_json,
)


@pytest.mark.parametrize("is_durable", [True, False])
def test_atomic_path_creates_only_the_final_file(tmp_path: Path, is_durable: bool) -> None:
    target = tmp_path / "new" / "folder" / "file.png"
    with atomic_path(target, is_durable=is_durable) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        temporary.write_text("content")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["file.png"]
    assert target.read_text() == "content"


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


def test_atomic_path_without_content_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        pass


def test_atomic_path_with_the_longest_name(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".png")
    with atomic_path(target) as temporary:
        temporary.write_text("x")
    assert target.exists()


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


def test_json_with_byte_order_mark_and_surrogate_pairs(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "file.json") == {"a": "\U0001f600"}


def test_json_with_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "file.json").write_text(json.dumps([name]))
    assert read_json(tmp_path / "file.json", has_file_names=True) == [name]
    with pytest.raises(ValueError, match="unpaired surrogate"):
        read_json(tmp_path / "file.json")


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
