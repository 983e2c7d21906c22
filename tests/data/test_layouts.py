from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcnseg.data.pairing.folder_names import FolderWord, read_folder_name
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.errors import DataError
from tests.data.helpers import by_split, touch


def pairs(root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """The pairs of each split as (stem, image, mask), without splitting what is in none."""
    return {
        name: [
            (s.stem, s.image.relative_to(root).as_posix(), s.mask.relative_to(root).as_posix())
            for s in samples
        ]
        for name, samples in by_split(root).items()
    }


NAMES = (
    "images masks, image label, Images Labels, imgs annotations, img mask, photos ground_truth, "
    "Pictures colour_labels, JPEGImages SegmentationClass, img_dir ann_dir, images_png masks_png, "
    "original_images label_images_semantic, image_2 semantic, . masks"
)


@pytest.mark.parametrize("names", NAMES.split(", "))
def test_folders_of_many_names_are_known(tmp_path: Path, names: str) -> None:
    images, masks = names.split()
    touch(tmp_path, f"{images}/a.jpg", f"{masks}/a.png", f"{images}/s/b.JPG", f"{masks}/s/b.PNG")
    prefix = "" if images == "." else f"{images}/"
    assert pairs(tmp_path) == {
        "train": [
            ("a", f"{prefix}a.jpg", f"{masks}/a.png"),
            ("s/b", f"{prefix}s/b.JPG", f"{masks}/s/b.PNG"),
        ]
    }


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}/images/a.jpg", "{}/masks/a.png"),
        ("images/{}/a.jpg", "masks/{}/a.png"),
        ("{}/a.jpg", "{}annot/a.png"),
        ("{}/a.jpg", "{}_labels/a_L.png"),
        ("{}_images/a.jpg", "{}_masks/a.png"),
        ("Images_{}/a.jpg", "Masks_{}/a.png"),
        ("{}/a_sat.jpg", "{}/a_mask.png"),
        ("deep/{}/images/a.jpg", "deep/{}/masks/a.png"),
    ],
)
@pytest.mark.parametrize("words", [("train", "val", "test"), ("training", "Validation", "testing")])
def test_splits_may_stand_anywhere(
    tmp_path: Path, image: str, mask: str, words: tuple[str, str, str]
) -> None:
    for word in words:
        touch(tmp_path, image.format(word), mask.format(word))
    found = pairs(tmp_path)
    assert {split: [pair[1:] for pair in some] for split, some in found.items()} == {
        split: [(image.format(word), mask.format(word))]
        for split, word in zip(("train", "val", "test"), words, strict=True)
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # One folder: two extensions, two prefixes, a suffix, and colored views, which are ignored.
        ("a.jpg a.png b.jpg b.png", "a=a.png b=b.png"),
        ("image_1.png image_2.png mask_1.png mask_2.png", "1=mask_1.png 2=mask_2.png"),
        ("images/a.png images/a_mask.png", "a=images/a_mask.png"),
        ("a.png a_mask.png a_colour.png b.png b_mask.png b_color.png", "a=a_mask.png b=b_mask.png"),
        ("image_2/a.png semantic/a.png semantic_rgb/a.png", "a=semantic/a.png"),
        # A folder with the name of a role may be part of the stem, or inside the other folder.
        ("images/label/a.jpg masks/label/a.png", "label/a=masks/label/a.png"),
        ("photos/images/a.jpg photos/masks/a.png", "photos/a=photos/masks/a.png"),
        ("images/a.jpg images/masks/a.png", "a=images/masks/a.png"),
        # Each split with its own names.
        (
            "train/images/a.jpg train/masks/a.png valid/img/b.jpg valid/gt/b.png",
            "a=train/masks/a.png b=valid/gt/b.png",
        ),
    ],
)
def test_other_layouts(tmp_path: Path, files: str, expected: str) -> None:
    touch(tmp_path, *files.split())
    found = [(stem, mask) for some in pairs(tmp_path).values() for stem, _, mask in some]
    assert " ".join(f"{stem}={mask}" for stem, mask in found) == expected


@pytest.mark.parametrize("suffix", ["_mask", "_L", "-label", "_seg", "_gtFine_labelIds"])
def test_a_common_suffix_of_the_masks_is_found(tmp_path: Path, suffix: str) -> None:
    names = ["0006R0_f01920", "0016E5_02400", "10"]
    one, two = tmp_path / "one", tmp_path / "two"
    touch(two, *(f"images/{n}.jpg" for n in names), *(f"masks/{n}{suffix}.png" for n in names))
    assert [pair[0] for pair in pairs(two)["train"]] == names
    assert find_splits(two).layout == f"images/ + masks/ with mask suffix {suffix}"
    touch(one, "a.jpg", "b.jpg", f"a{suffix}.png", f"b{suffix}.png", "a_color.png")
    assert pairs(one)["train"][0] == ("a", "a.jpg", f"a{suffix}.png")
    layout = f"one folder, with mask suffix {suffix}; 1 other images are ignored"
    assert find_splits(one).layout == layout


def test_voc_goes_by_its_lists(tmp_path: Path) -> None:
    names = ["2007_01", "2007_02", "2007_03", "2007_04", "2007_05"]
    touch(tmp_path, *(f"JPEGImages/{n}.jpg" for n in names))
    touch(tmp_path, *(f"SegmentationClass/{n}.png" for n in names[:3]), "SegmentationObject/x.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_01\n2007_02\n")
    (lists / "val.txt").write_text("2007_03\r\n")
    (lists / "test.txt").write_text("2007_04\n")
    found = pairs(tmp_path)
    assert {split: [p[0] for p in some] for split, some in found.items()} == {
        "train": ["2007_01", "2007_02"],
        "val": ["2007_03"],
    }
    assert "1 test images without masks are ignored" in find_splits(tmp_path).layout
    (lists / "val.txt").write_text("2007_03\n2007_05\n")
    assert find_pairs(tmp_path).images_without_mask == (tmp_path / "JPEGImages/2007_05.jpg",)
    (lists / "val.txt").write_text("2007_03\ngone\n")
    with pytest.raises(DataError, match=r"val.txt: lists 1 images .* \(gone\)"):
        find_pairs(tmp_path)


def test_voc_without_lists_takes_the_images_with_masks(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg", "SegmentationClass/a.png")
    splits = find_splits(tmp_path, val_fraction=0)
    assert [sample.stem for sample in splits.train] == ["a"]
    assert "1 images without masks are ignored" in splits.layout
    touch(tmp_path, "SegmentationClassAug/a.png")
    with pytest.raises(DataError, match=r"two ways.*SegmentationClass/.*SegmentationClassAug/"):
        find_splits(tmp_path)


def test_cityscapes(tmp_path: Path) -> None:
    train, val = "train/ulm/ulm_1", "val/bonn/bonn_1"
    for place in (train, val):
        touch(tmp_path, f"leftImg8bit/{place}_leftImg8bit.png")
        touch(tmp_path, *(f"gtFine/{place}_gtFine_{k}.png" for k in ("labelIds", "color")))
        touch(tmp_path, f"gtFine/{place}_gtFine_instanceIds.png")
    touch(tmp_path, f"gtFine/{train}_gtFine_polygons.json")
    splits = find_splits(tmp_path)
    assert [sample.stem for sample in splits.all_samples()] == ["ulm/ulm_1", "bonn/bonn_1"]
    assert splits.val[0].mask == tmp_path / f"gtFine/{val}_gtFine_labelIds.png"
    assert splits.layout == "Cityscapes: leftImg8bit/ + gtFine/ with _gtFine_labelIds"
    touch(tmp_path, f"gtFine/{train}_gtFine_labelTrainIds.png")
    assert find_splits(tmp_path).layout.endswith("labelIds")  # not all of them have it
    touch(tmp_path, f"gtFine/{val}_gtFine_labelTrainIds.png")
    assert find_splits(tmp_path).layout.endswith("labelTrainIds")
    with pytest.raises(DataError, match=r"the data is in the subfolder .*; pass that folder"):
        find_splits(tmp_path.parent)


def test_two_folders_of_masks_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "masks_upright/a.png", "masks_sensor/a.png", "other/x.jpg")
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: can be read in two ways, as 1 pairs of --images 'images/{{stem}}.jpg' "
        "--masks 'masks_sensor/{stem}.png' or as 1 pairs of --images 'images/{stem}.jpg' "
        "--masks 'masks_upright/{stem}.png'. Pass the options of one of them, or move the other "
        "files to another folder."
    )
    touch(tmp_path, "masks/a.png")  # the plain name is meant
    assert pairs(tmp_path)["train"] == [("a", "images/a.jpg", "masks/a.png")]
    layout = find_pairs(tmp_path).layout
    assert layout.endswith("3 other images are ignored")


def test_two_suffixes_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "masks/a_x.png", "masks/b_x.png")
    assert len(find_splits(tmp_path).all_samples()) == 2
    touch(tmp_path, "masks/a_y.png", "masks/b_y.png")
    with pytest.raises(DataError, match=r"masks/\{stem\}_x.png' or .*masks/\{stem\}_y.png'"):
        find_splits(tmp_path)


def test_images_in_no_split_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/a.jpg", "train/masks/a.png", "images/b.jpg", "masks/b.png")
    pairing = find_pairs(tmp_path, val_fraction=0)
    assert [sample.stem for sample in pairing.splits.all_samples()] == ["a"]
    assert pairing.layout.endswith("1 images without a split are ignored")


def test_a_folder_that_one_side_has_more_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg")
    touch(tmp_path, "annotations/trimaps/a.png", "annotations/trimaps/b.png", "annotations/c.xml")
    assert pairs(tmp_path)["train"][1] == ("b", "images/b.jpg", "annotations/trimaps/b.png")
    (tmp_path / "annotations/trimaps/b.png").unlink()
    with pytest.raises(DataError, match=r"--masks 'annotations/trimaps/\{stem\}.png'"):
        find_splits(tmp_path)


def test_labelme_files_pair_with_their_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text('{"shapes": []}')
    (tmp_path / "settings.json").write_text("{}")
    pairing = find_pairs(tmp_path, val_fraction=0)
    assert [sample.mask.name for sample in pairing.splits.train] == ["a.json", "b.json"]
    assert pairing.images_without_mask == (tmp_path / "c.jpg",)
    assert pairing.masks_without_image == ()
    assert pairing.layout == "LabelMe JSON by name"
    touch(tmp_path / "x", "images/a.jpg", "json/a.json")
    assert pairs(tmp_path / "x")["train"] == [("a", "images/a.jpg", "json/a.json")]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train_masks", FolderWord("train", "train", "mask", "", "masks")),
        ("valannot", FolderWord("val", "val", "mask", "", "annot")),
        ("val2017", FolderWord("val", "val", "", "", "2017")),
        ("masks_upright", FolderWord("", "", "mask", "upright", "masks_upright")),
        ("real_no_masks", FolderWord()),
        ("train_extra", FolderWord()),
        ("aachen", FolderWord()),
    ],
)
def test_folder_names_are_read(name: str, word: FolderWord) -> None:
    assert read_folder_name(name) == word


def test_a_voc_list_that_is_no_regular_file_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt")
    os.mkfifo(tmp_path / "ImageSets/Segmentation/train.txt")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read .not a regular file"):
        find_pairs(tmp_path)
