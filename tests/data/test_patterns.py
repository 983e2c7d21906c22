from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnseg.config import PairSource
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.errors import ConfigError, DataError
from tests.data.helpers import by_split, touch


def stems(root: Path, images: str, masks: str) -> dict[str, list[str]]:
    found = by_split(root, PairSource(images, masks))
    return {name: [sample.stem for sample in samples] for name, samples in found.items()}


def test_splits_and_stems_with_folders(tmp_path: Path) -> None:
    touch(tmp_path, "x/training/day/a.JPG", "y/train/day/a_idx.png", "x/training/day/a_depth.png")
    touch(tmp_path, "x/Valid/b.jpg", "y/val/b_idx.png", "x/unlabeled/c.jpg")
    found = stems(tmp_path, "x/{split}/{stem}.jpg", "y/{split}/{stem}_idx.png")
    assert found == {"train": ["day/a"], "val": ["b"]}


def test_absolute_patterns_endings_and_wildcards(tmp_path: Path) -> None:
    touch(tmp_path, "in/cam1/a.jpg", "in/cam2/b.tif", "far/a_v3.png", "far/b_v12.PNG")
    images, masks = "in/*/{stem}", f"{tmp_path}/far/{{stem}}_v*.png"
    assert stems(tmp_path, images, masks) == {"train": ["a", "b"]}
    assert stems(tmp_path, "**/cam[12]/{stem}.*", masks) == {"train": ["a", "b"]}
    assert stems(tmp_path, "in/cam?/{stem}.jpg", "far/{stem}_v3.png") == {"train": ["a"]}
    with pytest.raises(DataError, match=r"1 of 1 masks have no image|1 of 2 masks"):
        find_splits(tmp_path, PairSource("in/cam[!2]/{stem}.jpg", masks))


def test_in_one_folder_the_longer_pattern_wins(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a-truth.png", "b.png", "b-truth.png")
    assert stems(tmp_path, "{stem}.png", "{stem}-truth.png") == {"train": ["a", "b"]}


def test_a_side_without_split_follows_the_other(tmp_path: Path) -> None:
    touch(tmp_path, "im/train/a.jpg", "im/val/b.jpg", "m/a.png", "m/b.png", "m/c.png")
    pairing = find_pairs(tmp_path, PairSource("im/{split}/{stem}.jpg", "m/{stem}.png"))
    assert [s.stem for s in pairing.splits.train] == ["a"]
    assert [s.stem for s in pairing.splits.val] == ["b"]
    assert pairing.masks_without_image == (tmp_path / "m/c.png",)
    with pytest.raises(DataError, match=r"1 of 3 masks have no image \(m/c.png\)"):
        find_splits(tmp_path, PairSource("im/{split}/{stem}.jpg", "m/{stem}.png"))


def test_a_stem_that_is_repeated_must_be_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "a/a.jpg", "b/x.jpg", "m/a.png")
    assert stems(tmp_path, "{stem}/{stem}.jpg", "m/{stem}.png") == {"train": ["a"]}


def test_a_pattern_without_files_or_sense_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.jpg")
    with pytest.raises(DataError, match=r"--masks 'm/\{stem\}.png' matches no file below .*m\."):
        find_splits(tmp_path, PairSource("i/{stem}.jpg", "m/{stem}.png"))
    with pytest.raises(ConfigError, match=r"the pattern 'i/\[z-a\].*' is not valid"):
        find_pairs(tmp_path, PairSource("i/[z-a]{stem}.jpg", "m/{stem}.png"))


@given(st.sets(st.text("ab.+(_{ ü", min_size=1, max_size=5).map(str.strip).filter(bool)))
@settings(max_examples=30)
def test_any_names_pair_with_their_own_mask(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = tmp_path_factory.mktemp("names")
    names = {name for name in names if not name.startswith(".")}
    touch(root, "i/x.jpg", "m/x+m.png")
    touch(root, *(f"i/{name}.jpg" for name in names), *(f"m/{name}+m.png" for name in names))
    splits = find_splits(root, PairSource("i/{stem}.jpg", "m/{stem}+m.png"), val_fraction=0)
    assert {s.image.name: s.mask.name for s in splits.train} == {
        f"{name}.jpg": f"{name}+m.png" for name in names | {"x"}
    }


@given(st.text("{}[]!^*?-z/a.\\\0", max_size=8), st.booleans())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_pattern_holds_is_understood_or_refused(
    tmp_path: Path, text: str, is_before: bool
) -> None:
    touch(tmp_path, "i/a.jpg", "m/a.png")
    images = f"i/{text}{{stem}}.jpg" if is_before else f"i/{{stem}}{text}.jpg"
    with suppress(DataError, ConfigError):
        find_pairs(tmp_path, PairSource(images, "m/{stem}.png"))
