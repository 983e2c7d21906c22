from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.data.pairing.listing import find_images
from dcnseg.data.pairing.splits import Entry, Found, Splits, join_entries, split_off_validation
from dcnseg.data.sample import Sample
from dcnseg.errors import ConfigError, DataError
from tests.data.helpers import samples_of, touch


def make_pairs(folder: Path, stems: list[str]) -> None:
    touch(folder, *(f"images/{s}.jpg" for s in stems), *(f"masks/{s}.png" for s in stems))


def stems(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.stem for sample in samples]


def test_pairs_by_stem_in_subfolders_whatever_the_endings(tmp_path: Path) -> None:
    touch(tmp_path / "images", "b.JPG", "sub/a.tiff", "sub/deep/a.v2.png", "Upper Case ü.Jpeg")
    touch(tmp_path / "masks", "b.png", "sub/a.PNG", "sub/deep/a.v2.bmp", "Upper Case ü.png")
    samples = samples_of(tmp_path)
    assert stems(samples) == ["Upper Case ü", "b", "sub/a", "sub/deep/a.v2"]
    assert samples[2] == Sample(
        tmp_path / "images/sub/a.tiff", tmp_path / "masks/sub/a.PNG", "sub/a"
    )


def test_other_files_are_ignored(tmp_path: Path) -> None:
    make_pairs(tmp_path, ["a"])
    touch(tmp_path / "images", "Thumbs.db", ".DS_Store", "._a.jpg", "notes.txt", "desktop.ini")
    touch(tmp_path / "images", ".hidden/b.jpg", "__MACOSX/c.jpg")
    assert stems(samples_of(tmp_path)) == ["a"]


def test_umlauts_pair_however_they_are_composed(tmp_path: Path) -> None:
    touch(tmp_path, f"images/{unicodedata.normalize('NFC', 'ü')}.png")
    touch(tmp_path, f"masks/{unicodedata.normalize('NFD', 'ü')}.png")
    assert stems(samples_of(tmp_path)) == ["ü"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    assert find_images(tmp_path / "images") == [tmp_path / "images/link/a.png"]


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
@settings(max_examples=30)
def test_every_file_without_partner_is_counted(
    tmp_path_factory: pytest.TempPathFactory, images: set[int], masks: set[int]
) -> None:
    root = tmp_path_factory.mktemp("pairs")
    touch(root / "images", *(f"{i:02d}.jpg" for i in images))
    touch(root / "masks", *(f"{i:02d}.png" for i in masks))
    if images and images == masks:
        assert stems(samples_of(root)) == [f"{i:02d}" for i in sorted(images)]
        return
    with pytest.raises(DataError) as caught:
        samples_of(root)
    message = str(caught.value)
    if images - masks:
        assert f"{len(images - masks)} of {len(images)} images have no mask" in message
        assert f"images/{min(images - masks):02d}.jpg" in message
    if images and masks - images:
        assert f"{len(masks - images)} of {len(masks)} masks have no image" in message
        assert f"masks/{min(masks - images):02d}.png" in message


def test_the_message_names_both_lists_and_the_patterns_to_try(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{i}.jpg" for i in range(7)), "masks/0_L.png", "masks/x_L.png")
    with pytest.raises(DataError) as caught:
        find_splits(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 6 of 7 images have no mask (images/1.jpg, images/2.jpg, images/3.jpg, "
        "images/4.jpg, images/5.jpg, ...); 1 of 2 masks have no image (masks/x_L.png). "
        "An image and its mask must have the same name except for the extension and a common "
        "prefix or suffix. For other folders, pass patterns such as "
        "--images 'images/{stem}.jpg' --masks 'masks/{stem}_L.png'."
    )


def test_double_stems_are_refused(tmp_path: Path) -> None:
    make_pairs(tmp_path, ["a", "b"])
    touch(tmp_path, "images/a.png")
    with pytest.raises(DataError, match=r"2 files have .* \(images/a\.jpg, images/a\.png\)"):
        samples_of(tmp_path)
    pairing = find_pairs(tmp_path)
    assert stems(pairing.splits.all_samples()) == ["b"]
    assert pairing.layout == pairing.splits.layout == "images/ + masks/ by name"


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: is not a folder"):
        find_splits(tmp_path / "file")
    with pytest.raises(DataError, match="nowhere: does not exist; expected a folder"):
        find_splits(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no images .* images and masks, or train, val"):
        find_splits(tmp_path)
    touch(tmp_path, "images/a.jpg")
    with pytest.raises(DataError, match=r"1 of 1 images have no mask .* no folder named masks"):
        find_splits(tmp_path)
    (tmp_path / "images/a.jpg").unlink()
    touch(tmp_path, "masks/a.png")
    with pytest.raises(DataError, match=r"1 of 1 masks have no image \(masks/a.png\)"):
        find_splits(tmp_path)


def test_val_is_drawn_from_train_if_it_has_no_folder(tmp_path: Path) -> None:
    make_pairs(tmp_path / "test", ["t"])
    assert find_splits(tmp_path) == Splits(test=samples_of(tmp_path / "test"))  # nothing to draw
    make_pairs(tmp_path / "train", list("abcdefghij"))
    splits = find_splits(tmp_path, val_fraction=0.3)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [7, 3, 1]
    assert splits.is_val_drawn
    make_pairs(tmp_path / "val", ["v"])
    splits = find_splits(tmp_path)
    assert stems(splits.all_samples()) == [*"abcdefghij", "v", "t"]
    assert splits.layout == "{split}/images/ + {split}/masks/ by name"
    assert not splits.is_val_drawn


def test_the_split_is_fixed_by_seed_and_names(tmp_path: Path) -> None:
    make_pairs(tmp_path, [f"{i:02d}" for i in range(20)])
    first = find_splits(tmp_path, val_fraction=0.2, seed=0)
    assert first == find_splits(tmp_path, val_fraction=0.2, seed=0)
    assert first.val != find_splits(tmp_path, val_fraction=0.2, seed=1).val
    # The same on every machine and with every version: the split of a run must be repeatable.
    assert stems(first.val) == ["04", "07", "15", "18"]


@given(st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 5))
def test_splits_share_nothing_and_lose_nothing(count: int, fraction: float, seed: int) -> None:
    samples = tuple(Sample(Path(f"{i}.jpg"), Path(f"{i}.png"), str(i)) for i in range(count))
    train, val = split_off_validation(samples, fraction, seed)
    assert sorted(stems(train) + stems(val)) == sorted(stems(samples))
    assert len(train) >= 1
    if fraction > 0 and count > 1:
        assert len(val) == min(max(1, round(count * fraction)), count - 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_impossible_fractions_are_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"`val_fraction` is {fraction}"):
        find_splits(tmp_path, val_fraction=fraction)


@given(
    st.sets(
        st.tuples(st.sampled_from(["train", "val", "test"]), st.text("ab", min_size=1, max_size=4))
    )
)
def test_the_order_of_the_files_changes_nothing(keys: set[tuple[str, str]]) -> None:
    def found(order: int) -> Found:
        ordered = sorted(keys)
        random.Random(order).shuffle(ordered)
        return Found(
            [Entry(Path(split, stem + ".jpg"), split, stem) for split, stem in ordered],
            [Entry(Path(split, stem + ".png"), split, stem) for split, stem in ordered[::-1]],
            "any",
        )

    first = join_entries(found(0), val_fraction=0.2, seed=0)
    assert first == join_entries(found(1), val_fraction=0.2, seed=0)
    assert len(first.splits.all_samples()) == len(keys)
    assert all(sample.image.stem == sample.mask.stem for sample in first.splits.all_samples())
