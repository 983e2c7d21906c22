from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from dcnseg.files import (
    atomic_path,
    holds_foreign_files,
    is_output_folder,
    mark_output_folder,
    open_regular_file,
    read_json,
)


@pytest.mark.parametrize("is_durable", [True, False])
def test_content_appears_under_the_final_name_only(tmp_path: Path, is_durable: bool) -> None:
    target = tmp_path / "new" / "folder" / "file.png"
    with atomic_path(target, is_durable=is_durable) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")
        temporary.write_text("content")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["file.png"]
    assert target.read_text() == "content"


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
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


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
        pass


def test_the_longest_possible_name_fits(tmp_path: Path) -> None:
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
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"1" * 5000, "a number of 5000 digits; expected at most 4300"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "file.json")


def test_json_is_read_with_a_byte_order_mark_and_with_pairs_of_surrogates(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "file.json") == {"a": "\U0001f600"}


def test_names_of_files_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "file.json").write_text(json.dumps([name]))
    assert read_json(tmp_path / "file.json", has_file_names=True) == [name]
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        read_json(tmp_path / "file.json")


def test_output_folders_are_marked_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    assert not is_output_folder(folder)
    mark_output_folder(folder)
    mark_output_folder(folder)
    assert is_output_folder(folder)
    assert not is_output_folder(folder.parent)
    assert holds_foreign_files(folder.parent)
    assert not holds_foreign_files(folder)
    assert not holds_foreign_files(tmp_path / "missing")


def test_a_folder_that_may_not_be_looked_into_is_no_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, **_settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    assert not is_output_folder(tmp_path)
