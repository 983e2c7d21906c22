from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcnseg.config import PairSource
from dcnseg.data.pairing.folders import find_pairs
from dcnseg.data.pairing.listing import find_images, find_unsupported
from dcnseg.errors import DataError
from dcnseg.files import OUTPUT_MARKER, mark_output_folder
from dcnseg.inference.inputs import find_inputs
from tests.data.helpers import touch


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def test_folders_that_dcnseg_wrote_are_read_only_if_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "out/labels/a.png", "out/overlays/a.jpg", "sub/deep/run/preview.jpg")
    touch(tmp_path, "settings/config.json", "settings/b.jpg")  # not a run
    mark_output_folder(tmp_path / "out")
    for name in ("config.json", "files.json", "metrics.jsonl"):  # a run without a marker
        touch(tmp_path, f"sub/deep/run/{name}")
    assert names(tmp_path) == ["a.jpg", "settings/b.jpg"]
    assert names(tmp_path / "out") == ["labels/a.png", "overlays/a.jpg"]
    assert names(tmp_path / "out" / "labels") == ["a.png"]
    assert names(tmp_path / "sub" / "deep" / "run") == ["preview.jpg"]
    assert find_unsupported(tmp_path) == {
        tmp_path / "out": f"written by dcnseg, it contains {OUTPUT_MARKER}",
        tmp_path / "sub" / "deep" / "run": "a run folder of dcnseg train",
    }


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
def test_only_regular_files_are_images(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    touch(Path(), "images/a.png", "masks/a.png")
    make(Path("images/x.png"))
    Path("images/link.png").symlink_to("x.png")
    Path("images/gone.png").symlink_to("nothing.png")
    assert names(Path("images")) == ["a.png", "gone.png"]  # that one is an error when it is read
    assert find_unsupported(Path("images")) == {
        Path("images/link.png"): "not a regular file",
        Path("images/x.png"): "not a regular file",
    }


def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder unreadable, for the administrator too."""
    scan = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_folders_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.png", "sub/b.png")
    forbid(tmp_path / "sub", monkeypatch)
    assert names(tmp_path) == ["a.png"]
    assert find_unsupported(tmp_path) == {
        tmp_path / "sub": "a folder that cannot be read (Permission denied)"
    }
    notes: list[str] = []
    find_inputs([str(tmp_path)], on_note=notes.append)
    assert notes == [f"Skipped {tmp_path}/sub: a folder that cannot be read (Permission denied)."]
    forbid(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        names(tmp_path)


def test_files_of_other_formats_are_explained(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "sub/b.HEIC", "c.DNG", ".hidden/d.mov", "e.txt", "f.pdf")
    assert {
        path.name: why.partition(";")[0] for path, why in find_unsupported(tmp_path).items()
    } == {
        "a.mp4": "a video",
        "b.HEIC": "a HEIC or AVIF image",
        "c.DNG": "a raw image",
        "f.pdf": "a PDF",
    }
    with pytest.raises(DataError, match=r"Skipped: a\.mp4 \(a video; .*\), and 3 more\."):
        find_pairs(tmp_path)


def test_layouts_of_fixed_names_skip_outputs_too(tmp_path: Path) -> None:
    touch(tmp_path / "voc", "JPEGImages/a.jpg", "SegmentationClass/labels/a.png")
    mark_output_folder(tmp_path / "voc" / "SegmentationClass")
    pairing = find_pairs(tmp_path / "voc")
    assert pairing.layout == "no masks found"
    city = tmp_path / "city"
    touch(city, "leftImg8bit/train/u/u_leftImg8bit.png", "gtFine/train/u/u_gtFine_labelIds.png")
    assert find_pairs(city, val_fraction=0).layout.startswith("Cityscapes")
    mark_output_folder(city / "gtFine")
    assert find_pairs(city).layout == "no masks found"
    root = tmp_path / "patterns"
    touch(root, "a.jpg", "out/labels/a.png", "out/overlays/a.jpg")
    mark_output_folder(root / "out")
    source = PairSource("**/{stem}.jpg", "out/labels/{stem}.png")  # named, so it is read
    pairing = find_pairs(root, source, val_fraction=0)
    assert [sample.stem for sample in pairing.splits.train] == ["a"]
