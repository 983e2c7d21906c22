from __future__ import annotations

from pathlib import Path

import pytest

from dcnseg.files import atomic_path


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
