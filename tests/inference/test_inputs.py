from __future__ import annotations

import os
from pathlib import Path, PurePath

import pytest
from PIL import Image

from dcnseg.errors import ConfigError, DataError
from dcnseg.files import OUTPUT_MARKER
from dcnseg.inference.inputs import InputImage, find_inputs
from dcnseg.inference.remote_files import UrlPath
from tests.data.helpers import touch


def write_images(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(root / name)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", "a.png", "sub/b.jpg", "sub/deep/c ü.PNG")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def names(arguments: list[str], stdin: list[str] | None = None) -> list[str]:
    return sorted(str(image.name) for image in find_inputs(arguments, stdin or []))


def test_folder_keeps_its_structure(photos: Path) -> None:
    assert names([str(photos)]) == ["a", "sub/b", "sub/deep/c ü"]


def test_files_and_patterns(photos: Path) -> None:
    assert names([str(photos / "a.png")]) == ["a"]
    assert names([f"{photos}/**/*.jpg"]) == ["sub/b"]
    assert names([f"{photos}/sub/*.jpg"]) == ["b"]


def test_list_on_stdin(photos: Path) -> None:
    assert names(["-"], [f"{photos}/a.png\n", "\n", f"{photos}/sub/b.jpg\n"]) == ["a", "b"]
    assert names(["-"], [f"{photos}/a.png\0{photos}/sub/b.jpg\0"]) == ["a", "b"]
    assert names(["-"], [f"\ufeff{photos}/a.png\r\n"]) == ["a"]  # as Windows writes lists
    for empty in (["\n"], None):
        with pytest.raises(DataError, match="the list on stdin is empty"):
            find_inputs(["-"], empty)


def test_urls_are_refused_where_they_are_not_accepted() -> None:
    (image,) = find_inputs(["https://example.org/a.jpg"])
    with pytest.raises(DataError, match="URLs are not supported; download the image first"):
        image.read()


def test_duplicate_images_are_merged(photos: Path) -> None:
    assert names([f"{photos}/a.png", f"{photos}/*.png"]) == ["a"]


def test_missing_file_is_kept() -> None:
    (image,) = find_inputs(["no/such.jpg"])
    assert (image.path, image.name) == (Path("no/such.jpg"), PurePath("such"))


def test_images_that_differ_only_in_the_suffix_keep_it(photos: Path) -> None:
    write_images(photos, "a.jpg")
    assert names([str(photos)]) == ["a.jpg", "a.png", "sub/b", "sub/deep/c ü"]


def test_equal_file_names_are_made_unique_by_folders(photos: Path) -> None:
    write_images(photos, "sub/a.png")
    files = [f"{photos}/a.png", f"{photos}/sub/a.png", f"{photos}/sub/b.jpg"]
    assert names(files) == ["a", "sub/a", "sub/b"]


def test_folders_with_equal_structure_get_unique_names(photos: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", "sub/b.png", "sub/b.jpg")  # would be sub/b like sub/b.jpg
    images = find_inputs([str(photos), str(tmp_path / "other")])
    assert len({image.name for image in images}) == len(images)


def test_images_with_the_same_output_are_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, "x.jpg", "x.png", "x.jpg.png")
    with pytest.raises(ConfigError, match=r"have the same output name x\.jpg\. Rename"):
        find_inputs([str(tmp_path)])


def test_one_of_several_arguments_without_images_is_kept(photos: Path, tmp_path: Path) -> None:
    empty = tmp_path / "folder.png"
    empty.mkdir()
    images = find_inputs([str(empty), str(photos / "a.png"), f"{empty}/*.jpg"])
    assert [image.path for image in images] == [empty, photos / "a.png", empty / "*.jpg"]
    with pytest.raises(DataError, match=r"folder\.png: no images in this folder"):
        images[0].read()
    with pytest.raises(DataError, match=r"\*\.jpg: no file matches"):
        images[2].read()


def test_masks_of_a_data_folder_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, "train/images/a.png", "train/masks/a.png", "val/images/b.png")
    write_images(tmp_path, "val/masks/sub/b.png", "masks/c.png")
    notes: list[str] = []
    inputs = find_inputs([str(tmp_path)], on_note=notes.append)
    # masks/ without images/ beside it may be any folder of images.
    assert [str(image.name) for image in inputs] == ["masks/c", "train/images/a", "val/images/b"]
    (note,) = notes
    assert note.startswith(f"{tmp_path} is a data folder: using its 3 images, and skip")
    assert note.endswith(f"skipping 2 masks in {tmp_path}/train/masks, {tmp_path}/val/masks.")
    # A mask folder as an argument is used.
    assert names([str(tmp_path / "train" / "masks")]) == ["a"]


def test_unsupported_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.HEIC", "sub/c.heic", "d.dng", "notes.txt")
    unsupported = "1 .dng, 2 .heic and 1 .mp4 files"
    text = rf"no images in this folder \(not supported: {unsupported}\)"
    with pytest.raises(DataError, match=text):
        find_inputs([str(tmp_path)])
    write_images(tmp_path, "e.png")
    notes: list[str] = []
    assert len(find_inputs([str(tmp_path)], on_note=notes.append)) == 1
    assert notes == [f"{tmp_path}: skipped {unsupported} (format not supported)."]


def test_impossible_file_names_are_kept(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    arguments = [str(tmp_path / "loop.png"), "a" * 5000 + ".png"]
    images = find_inputs(arguments)
    assert [str(image) for image in images] == arguments
    for image in images:
        with pytest.raises(DataError, match="cannot be opened"):
            image.read()


def test_list_with_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_images(tmp_path, name)
    read_end, write_end = os.pipe()
    os.write(write_end, os.fsencode(tmp_path / name) + b"\n")
    os.close(write_end)
    with open(read_end, encoding="utf-8") as stdin:  # noqa: PTH123
        (image,) = find_inputs(["-"], stdin)
    assert image.read().shape == (3, 4, 3)


def test_files_in_the_output_folders_are_skipped(photos: Path) -> None:
    out = photos / "sub"
    arguments = [str(photos / "a.png"), f"{photos}/sub/*.jpg", f"{photos}/sub/deep/c ü.PNG"]
    notes: list[str] = []
    images = find_inputs(arguments, outputs=[out], on_note=notes.append)
    assert [str(image.name) for image in images] == ["a"]
    first = photos / "sub" / "b.jpg"
    assert notes == [f"Skipped 2 files in the output folder, for example {first}."]
    with pytest.raises(DataError, match="all images are in the output folder"):
        find_inputs(arguments[1:], outputs=[out])
    with pytest.raises(DataError, match="no images in this folder outside the output folder"):
        find_inputs([str(out)], outputs=[out])


def find_at_urls(*arguments: str, outputs: tuple[UrlPath, ...] = ()) -> list[InputImage]:
    return find_inputs(arguments, outputs=outputs, accept_urls=True)


@pytest.fixture
def bucket(photos: Path) -> UrlPath:
    """The same files at a URL, with a hidden file and a folder of outputs."""
    write_images(photos, ".hidden/d.png", "old/e.png")
    (photos / "old" / OUTPUT_MARKER).touch()
    return UrlPath(f"local://{photos}")


def test_folders_and_patterns_at_urls(bucket: UrlPath) -> None:
    images = find_at_urls(str(bucket))
    assert [str(image.name) for image in images] == ["a", "sub/b", "sub/deep/c ü"]
    assert str(images[0]) == f"{bucket}/a.png"
    assert images[0].read().shape == (3, 4, 3)
    (image,) = find_at_urls(f"{bucket}/**/*.jpg")
    assert (str(image), str(image.name)) == (f"{bucket}/sub/b.jpg", "sub/b")
    (image,) = find_at_urls(f"{bucket}/no.png")
    with pytest.raises(DataError, match=r"^local://.*no\.png: cannot be read \(No such file"):
        image.read()
    with pytest.raises(DataError, match=r"\*\.gif: no file matches this pattern"):
        find_at_urls(f"{bucket}/*.gif")
    with pytest.raises(DataError, match="no images in this folder"):
        find_at_urls(f"{bucket}/sub/deep", outputs=(bucket / "sub",))


def test_equal_names_at_urls_and_in_folders(bucket: UrlPath, photos: Path) -> None:
    (photos / "sub" / "b.jpg").unlink()
    assert len(find_at_urls(str(photos / "a.png"), (photos / "a.png").as_uri())) == 1
    images = find_at_urls(f"{bucket}/a.png", str(photos / "a.png"))
    assert len({image.name for image in images}) == 2
    images = find_at_urls(f"{bucket}/a.png", f"{bucket}/a.png/", f"{bucket}/*.png")
    assert [str(image.name) for image in images] == ["a"]


def test_masks_at_urls_are_skipped(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a.png", "masks/a.png")
    notes: list[str] = []
    (image,) = find_inputs([f"local://{tmp_path}"], accept_urls=True, on_note=notes.append)
    assert str(image) == f"local://{tmp_path}/images/a.png"
    assert f"skipping 1 masks in local://{tmp_path}/masks." in notes[0]
