"""Each common problem in a small generated data folder, and what a check reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dcnseg.data.check import pairs
from dcnseg.data.check.findings import Finding, format_findings, raise_errors
from dcnseg.data.check.inspection import MaskFacts, inspect_mask
from dcnseg.data.check.report import CheckReport
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import load_label_map
from dcnseg.data.image_io import write_jpeg, write_png
from dcnseg.errors import DataError
from tests.data.helpers import check, errors

HW = (40, 48)
Array = npt.NDArray[Any]
RNG = np.random.default_rng(5)


def ids(*values: int, dtype: type = np.uint8) -> Array:
    """A mask in which the values stand in stripes."""
    stripes = np.array(values)[np.arange(HW[1]) * len(values) // HW[1]]
    return np.tile(stripes, (HW[0], 1)).astype(dtype)


def write_data(root: Path, masks: Mapping[str, Array], classes: list[int] | None = None) -> Path:
    """Write masks (as PNG) with images of noise, and maybe a class list of these ids."""
    for name, mask in masks.items():
        image = RNG.integers(0, 256, (*mask.shape[:2], 3), np.uint8)
        write_png(root / "images" / f"{name}.png", image)
        Path(root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    if classes is not None:
        entries = [{"id": i, "name": f"c{i}", "color": [i % 256, 9, i // 256]} for i in classes]
        (root / "classes.json").write_text(json.dumps({"classes": entries}))
    return root


def three(mask: Array) -> dict[str, Array]:
    return dict.fromkeys("abc", mask)


def warnings(report: CheckReport) -> list[str]:
    return [finding.kind for finding in report.findings if finding.severity == "warning"]


def finding(report: CheckReport, kind: str) -> Finding:
    return next(finding for finding in report.findings if finding.kind == kind)


def test_clean_data_is_counted(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(0, 1, 1, 255)), [0, 1])
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"x")
    calls: list[tuple[int, int]] = []
    report = check(tmp_path, on_progress=lambda *call: calls.append(call))
    assert report.findings == []
    assert report.is_clean
    assert report.splits == {"train": 2, "val": 1, "test": 0}
    assert report.sizes == {"48x40": 3}
    assert report.image_modes == {"PNG RGB 8 bit": 3}
    assert report.mask_modes == {"PNG L 8 bit, values": 3}
    pixels = HW[0] * HW[1]
    assert [(entry.id, entry.pixels, entry.images) for entry in report.classes] == [
        (0, 3 * pixels // 4, 3),
        (1, 3 * pixels // 2, 3),
    ]
    assert report.ignored_pixels == 3 * pixels // 4
    assert report.train_pixels == (2 * pixels // 4, 2 * pixels // 2)
    assert [entry.value for entry in report.values] == [1, 0, 255]
    assert report.other_files == (str(tmp_path / "images" / "Thumbs.db"),)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    json.dumps(report.to_dict(), allow_nan=False)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    masks = {name: ids(0, 1) for name in ("fine", "good", "nice", "page", "cut", "size", "value")}
    write_data(tmp_path, masks, [0, 1])
    (tmp_path / "images" / "page.png").write_bytes(b"<html>")
    (tmp_path / "masks" / "cut.png").write_bytes(b"")
    write_png(tmp_path / "masks" / "size.png", ids(0, 1)[:20])
    write_png(tmp_path / "masks" / "value.png", ids(0, 7))
    write_png(tmp_path / "images" / "alone.png", ids(0))
    report = check(tmp_path)
    kinds = "image-without-mask size-mismatch unknown-values unreadable-image unreadable-mask"
    assert sorted(errors(report)) == kinds.split()
    with pytest.raises(DataError) as caught:
        raise_errors(report.findings)
    text = str(caught.value)
    assert text.startswith("Found 5 problems in the dataset:\n")
    assert "images/page.png: is an HTML page" in text
    assert "masks/cut.png: is empty. Restore the file" in text
    assert "masks/size.png: is 48x20 pixels, but its image size.png is 48x40" in text
    assert "masks/value.png: 960 pixels have the value 7; the 2 classes of classes.json" in text
    assert "images/alone.png: has no mask" in text


def test_long_lists_are_shortened_by_kind() -> None:
    findings = [Finding("error", "a", f"{i}.png", "is bad.") for i in range(12)]
    findings.append(Finding("error", "b", "x.png", "is worse.", "Fix it."))
    lines = format_findings(findings)
    assert lines[0] == "0.png: is bad."
    assert lines[10:] == ["... and 2 more of this kind (a)", "x.png: is worse. Fix it."]
    with pytest.raises(DataError, match=r"^x\.png: is worse\. Fix it\.$"):
        raise_errors(findings[12:])


@pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (65535, np.uint16)])
def test_0_and_the_greatest_value_are_two_classes(tmp_path: Path, top: int, dtype: type) -> None:
    report = check(write_data(tmp_path, three(ids(0, top, dtype=dtype))))
    assert report.is_clean
    assert f"only the values 0 and {top}" in finding(report, "binary").what
    assert [entry.id for entry in report.classes] == [0, top]
    entries = [{"id": 0, "name": "background"}, {"id": top, "name": "foreground"}]
    assert report.suggestion.classes == {"classes": entries, "ignore": []}


MIXED = {"a": ids(0, 1), "b": ids(0, 1), "c": ids(0, 255)}
# The kinds of the errors, masks, the ids of the class list, and text of the first kind's finding.
PROBLEMS: list[tuple[str, dict[str, Array], list[int] | None, str]] = [
    ("foreground-ignored", three(ids(0, 255)), [0, 1], "Give that class the id 255"),
    ("mixed-foreground", MIXED, None, "c.png: "),
    ("mixed-foreground", MIXED, [0, 1], "c.png: "),
    ("mixed-foreground unknown-values", MIXED, [0, 255], "c.png: "),
    (
        "classes",
        three(np.tile(np.arange(3, 68, dtype=np.uint8), (40, 1))),
        None,
        "have 65 different values 3..67; classes are suggested for at most 64",
    ),
    ("classes", three(ids(7)), None, "the only value in the masks is 7; training needs at least"),
    (
        "colors-without-classes",  # blurred by JPEG
        three(RNG.integers(0, 256, (*HW, 3), np.uint8)),
        None,
        "too many colors for classes",
    ),
    (
        "mixed-encodings",
        {"a": ids(0, 1), "b": ids(0, 1), "c": np.tile(np.array([0, 9, 0], np.uint8), (*HW, 1))},
        [0, 1],
        "2 masks as ids and 1 masks as colors",
    ),
    ("nothing-to-learn", three(ids(255)), [0, 1], "all 2 masks is ignored"),
]


@pytest.mark.parametrize(("kinds", "masks", "classes", "text"), PROBLEMS)
def test_masks_that_cannot_be_used(
    tmp_path: Path, kinds: str, masks: dict[str, Array], classes: list[int] | None, text: str
) -> None:
    report = check(write_data(tmp_path, masks, classes))
    assert set(errors(report)) == set(kinds.split())
    assert text in str(finding(report, kinds.split()[0]))
    if "classes" in kinds:
        assert report.class_map is None
        assert report.suggestion.classes is None


def smooth() -> Array:
    mask = ids(0, 0, 0, 255, 255, 255).astype(int)
    edge = np.abs(np.diff(mask, axis=1, prepend=0)) > 0
    mask[edge] = np.linspace(1, 254, int(edge.sum())).astype(int)
    return mask.astype(np.uint8)


def test_smooth_masks_are_refused_and_thresholded_when_asked(tmp_path: Path) -> None:
    write_data(tmp_path, three(smooth()))
    report = check(tmp_path)
    assert errors(report) == ["smeared"]
    assert "42 values, 0.021 of the pixels" in finding(report, "smeared").what
    assert report.suggestion.command.endswith("--mask-threshold 128")
    report = check(tmp_path, mask_threshold=128)
    assert report.is_clean
    assert [entry.name for entry in report.classes] == ["background", "foreground"]
    assert report.suggestion.classes is not None
    assert report.suggestion.classes["threshold"] == 128
    (tmp_path / "classes.json").write_text(json.dumps(report.suggestion.classes))
    assert check(tmp_path).is_clean


def test_jpeg_masks_are_refused_unless_thresholded(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(0, 255)))
    for path in (tmp_path / "masks").iterdir():
        rgb = np.repeat(smooth()[..., None], 3, axis=2)
        write_jpeg(path.with_suffix(".jpg"), rgb, quality=80)
        path.unlink()
    assert errors(check(tmp_path)) == ["smeared"]
    assert check(tmp_path, mask_threshold=128).is_clean
    write_data(tmp_path, {}, list(range(255)))  # all values are classes
    report = check(tmp_path)
    assert errors(report) == ["lossy-mask"] * 3
    assert "which changes values at class boundaries" in finding(report, "lossy-mask").what


def test_at_most_64_values_are_suggested_as_classes(tmp_path: Path) -> None:
    report = check(write_data(tmp_path, three(np.tile(np.arange(64, dtype=np.uint8), (40, 1)))))
    assert report.is_clean
    assert len(report.classes) == 64


def test_classes_json_overrides_classes_txt_and_values(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": ids(0, 1, 255), "b": ids(2), "c": ids(0)})
    assert [entry.name for entry in check(tmp_path).classes] == ["class_0", "class_1", "class_2"]
    report = check(tmp_path, ignore=(1,))
    assert report.class_map is not None
    assert (report.class_map.ids, report.class_map.ignored_ids) == ((0, 2), (1, 255))
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert [entry.name for entry in check(tmp_path).classes] == ["a", "b", "c", "d"]
    report = check(tmp_path, mask_threshold=100)
    assert "classes.txt has 4 classes; a threshold" in finding(report, "classes").what
    (tmp_path / "classes.json").write_text('{"classes": [{"id": 3, "name": "x"}]}')
    assert [entry.name for entry in check(tmp_path).classes] == ["x"]
    (tmp_path / "classes.json").write_text("{")
    [wrong] = check(tmp_path).findings
    assert (wrong.severity, wrong.kind) == ("error", "classes")
    assert wrong.file == str(tmp_path / "classes.json")


COLORS = np.array([[0, 0, 0], [200, 10, 10], [10, 200, 10]], np.uint8)


def test_colors_without_a_class_list_are_suggested_as_classes(tmp_path: Path) -> None:
    write_data(tmp_path, three(COLORS[ids(0, 1, 2, 2)]))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    report = check(tmp_path)
    assert errors(report) == ["colors-without-classes"] * 3
    assert "there are no class colors in classes.txt" in report.findings[0].what
    (tmp_path / "classes.txt").unlink()
    report = check(tmp_path)
    assert errors(report) == ["colors-without-classes"]
    assert "3 masks, 3 colors" in finding(report, "colors-without-classes").what
    assert report.suggestion.classes is not None
    colors = [entry["color"] for entry in report.suggestion.classes["classes"]]
    assert colors == [[0, 0, 0], [10, 200, 10], [200, 10, 10]]  # black, then by pixels
    (tmp_path / "classes.json").write_text(json.dumps(report.suggestion.classes))
    report = check(tmp_path)
    assert report.is_clean
    assert [entry.images for entry in report.classes] == [3, 3, 3]


@pytest.mark.parametrize(
    ("mask", "mode", "classes"),
    [
        (ids(0, 1).astype(bool), "PNG 1 1 bit, values", [0, 1]),
        (np.dstack([*[ids(200)] * 3, ids(0, 255)]), "PNG RGBA 8 bit, alpha", [0, 255]),
        (np.dstack([ids(0, 3)] * 3), "PNG RGB 8 bit, equal channels", [0, 3]),
    ],
)
def test_ids_in_other_encodings(tmp_path: Path, mask: Array, mode: str, classes: list[int]) -> None:
    report = check(write_data(tmp_path, three(mask)))
    assert report.is_clean
    assert report.mask_modes == {mode: 3}
    assert [entry.id for entry in report.classes] == classes


def test_palettes_of_another_order_are_warned_about(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(0, 1)), [0, 1])
    for name, palette in (("a", COLORS), ("b", COLORS), ("c", COLORS[::-1])):
        write_png(tmp_path / "masks" / f"{name}.png", ids(0, 1), palette)
    report = check(tmp_path)
    assert warnings(report) == ["palettes-differ"]
    assert "the index 0 the color" in finding(report, "palettes-differ").what


def test_values_shifted_by_one_are_recognized(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(1, 2, 3)), [0, 1, 2])
    report = check(tmp_path)
    assert "shifted-by-one" in errors(report)
    assert "have the values 1..3, but the ids of the 3 classes are 0..2" in report.findings[0].what
    assert report.suggestion.classes is not None
    (tmp_path / "classes.json").write_text(json.dumps(report.suggestion.classes))
    report = check(tmp_path)
    assert report.is_clean
    assert [(entry.id, entry.name) for entry in report.classes] == [(1, "c0"), (2, "c1"), (3, "c2")]


def test_254_may_be_void(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(0, 1, 2, 254)))
    report = check(tmp_path)
    assert warnings(report) == ["void-value"]
    assert report.suggestion.ignore_index == (254,)
    assert report.suggestion.command.endswith("--ignore-index 254")
    assert report.suggestion.classes is not None
    assert report.suggestion.classes["ignore"] == [{"id": 254, "name": "void"}]
    report = check(tmp_path, ignore=(254,))
    assert len(report.classes) == 3
    write_data(tmp_path, {}, [0, 1, 2])
    assert "pass --ignore-index 254" in str(check(tmp_path).findings[0])


def test_images_and_masks_without_content_are_named(tmp_path: Path) -> None:
    write_data(tmp_path, {}, [0, 1, 2])
    dot = np.zeros((1, 1), np.uint8)
    masks = {"a": ids(0, 1), "void": ids(255), "zero": ids(0), "dot": dot}
    write_data(tmp_path / "train", masks)
    write_data(tmp_path / "val", {"b": ids(0, 1)})
    report = check(tmp_path)
    assert report.is_clean
    assert set(warnings(report)) == {"absent-class", "all-ignored", "one-class", "tiny"}
    assert finding(report, "all-ignored").file.endswith("void.png")
    assert "'c0' (id 0)" in finding(report, "one-class").what
    assert "'c2' (id 2)" in finding(report, "absent-class").what
    assert "is 1x1 pixels" in finding(report, "tiny").what


def write_turned(root: Path, orientations: Mapping[str, int], *, stored: bool) -> Path:
    """Write images with an EXIF tag, and masks as displayed or as stored."""
    for name, orientation in orientations.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        (root / "images").mkdir(exist_ok=True)
        noise = RNG.integers(0, 256, (*HW, 3), np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{name}.jpg", exif=exif)
        mask = ids(0, 1) if stored or orientation < 5 else ids(0, 1).T
        write_png(root / "masks" / f"{name}.png", mask)
    return root


def test_masks_that_fit_the_stored_pixels_are_reported(tmp_path: Path) -> None:
    report = check(write_turned(tmp_path, {"a": 6, "b": 8, "c": 1}, stored=True))
    assert report.is_clean
    assert warnings(report) == ["mask-turned"]
    assert "like 2 of the masks" in finding(report, "mask-turned").what
    write_turned(tmp_path, {"d": 3}, stored=True)
    report = check(tmp_path)
    assert errors(report) == ["rotation-unknown"]  # most likely it is stored too
    assert report.findings[0].file.endswith("d.png")


def test_ambiguous_rotations_are_one_warning(tmp_path: Path) -> None:
    report = check(write_turned(tmp_path, {"a": 2, "b": 3, "c": 6, "d": 4}, stored=False))
    assert report.is_clean
    assert warnings(report) == ["rotation-unknown"]
    text = finding(report, "rotation-unknown").what
    assert "has the EXIF orientation 2. For 3 rotated or mirrored images" in text
    assert "the masks of 1 other rotated images do" in text


def test_files_of_several_frames_are_named(tmp_path: Path) -> None:
    write_data(tmp_path, {"a": ids(0, 1), "b": ids(0, 1), "pages": ids(0, 1)})
    image = Image.open(tmp_path / "images" / "pages.png").convert("RGB")
    image.save(tmp_path / "images" / "pages.tif", save_all=True, append_images=[image])
    (tmp_path / "images" / "pages.png").unlink()
    for _ in range(2):  # the second time from the cache
        report = check(tmp_path)
        assert finding(report, "several-frames").file.endswith("pages.tif")
    assert report.is_clean


def test_the_same_image_twice_is_named(tmp_path: Path) -> None:
    write_data(tmp_path / "train", {name: ids(0, 1) for name in "abc"})
    write_data(tmp_path / "val", {"d": ids(0, 1)})
    folder = tmp_path / "train" / "images"
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    Image.open(folder / "c.png").save(tmp_path / "val" / "images" / "d.png", compress_level=1)
    report = check(tmp_path)
    assert report.is_clean
    assert sorted(warnings(report)) == ["same-image-in-two-splits", "same-image-twice"]
    near = str(finding(report, "same-image-in-two-splits"))
    assert "d.png: (val) is nearly the same image as" in near
    twice = str(finding(report, "same-image-twice"))
    assert "b.png: (train) is the same file as" in twice
    assert twice.endswith("a.png (train). Remove one.")


@pytest.mark.parametrize("is_exact", [True, False])
def test_many_images_that_are_alike_are_one_finding(tmp_path: Path, is_exact: bool) -> None:
    write_data(tmp_path / "train", {str(i): ids(0, 1) for i in range(8)}, [0, 1])
    write_data(tmp_path / "val", {str(i): ids(0, 1) for i in range(8, 10)}, [0, 1])
    content = (tmp_path / "train" / "images" / "0.png").read_bytes()
    files = sorted(str(path) for path in tmp_path.glob("*/images/*.png"))
    for file in files:
        end = b"" if is_exact else Path(file).stem.encode()
        Path(file).write_bytes(content + end)
    report = check(tmp_path)
    [double] = report.findings
    assert double.kind == "same-image-in-two-splits"
    words = "are the same file" if is_exact else "look nearly the same"
    start = f"{files[0]}: (train) and 9 others {words}: {files[1]} (train), "
    assert str(double).startswith(start)
    assert double.what.endswith(", ... and 6 more.")
    assert double.advice == "Keep them all in one split, or the scores will be too high."
    [entry] = report.to_dict()["findings"]
    assert sorted(entry["files"]) == files


def test_the_advice_names_the_values_of_all_masks(tmp_path: Path) -> None:
    masks = {"x": ids(0, 1, 12), "y": ids(0, 1, 3), "z": ids(0, 1, 8, 9, 10, 11)}
    write_data(tmp_path, masks, [0, 1])
    found = [f for f in check(tmp_path, ignore=[7]).findings if f.kind == "unknown-values"]
    values = {Path(f.file).stem: f.what.partition(" have the value ")[2][:2] for f in found}
    assert values == {"x": "12", "y": "3;", "z": "8,"}
    advice = "Add a class, or pass --ignore-index 3,7,8,9,10,11,12."
    assert [f.advice for f in found] == [advice] * 3
    assert "unknown-values" not in errors(check(tmp_path, ignore=[3, 7, 8, 9, 10, 11, 12]))


def test_outputs_of_early_versions_are_reported(tmp_path: Path) -> None:
    write_data(tmp_path, three(ids(0, 1)), [0, 1])
    out = tmp_path / "predictions"
    out.mkdir()
    (tmp_path / "masks").rename(out / "labels")
    assert "likely-output" not in warnings(check(tmp_path))
    (out / "overlays").mkdir()
    report = check(tmp_path)
    assert finding(report, "likely-output").file == str(out)
    assert sum(report.splits.values()) == 3
    (out / "notes").mkdir()  # not an output of predict
    assert "likely-output" not in warnings(check(tmp_path))
    (out / ".dcnseg-output").touch()
    assert errors(check(tmp_path)) == ["no-masks"]


def test_settings_fit_the_data(tmp_path: Path) -> None:
    rare = ids(0)
    rare[:4, :8] = 1
    suggestion = check(write_data(tmp_path / "it's", three(rare))).suggestion
    assert suggestion.class_weights == "sqrt"
    assert suggestion.crop_size == (64, 64)
    assert suggestion.batch_size == 2
    assert suggestion.command == (
        f"""dcnseg train '{tmp_path}/it'"'"'s' --out 'runs/it'"'"'s' """
        "--crop-size 64,64 --batch-size 2 --class-weights sqrt"
    )
    even = check(write_data(tmp_path / "even", three(ids(0, 1)))).suggestion
    assert even.class_weights == "none"


def test_files_that_have_not_changed_are_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path, three(ids(0, 1, 2)))
    first = check(tmp_path)
    opened: list[Path] = []

    def inspect(path: Path) -> MaskFacts:
        opened.append(path)
        return inspect_mask(path)

    monkeypatch.setattr(pairs, "inspect_image", opened.append)
    monkeypatch.setattr(pairs, "inspect_mask", inspect)
    assert check(tmp_path) == first
    assert opened == []
    write_png(tmp_path / "masks" / "b.png", ids(0, 1, 2, 3))
    report = check(tmp_path)
    assert opened == [tmp_path / "masks" / "b.png"]
    assert len(report.classes) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=9), st.sampled_from(["ids", "kkk"]))
def test_counted_values_are_decoded_as_the_masks_are(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], encoding: str
) -> None:
    root = tmp_path_factory.mktemp("data")
    mask = np.array(values, np.uint16)[None]
    if encoding == "kkk":
        mask = np.repeat((mask % 256).astype(np.uint8)[..., None], 3, axis=2)
    assume((mask != 255).any())  # a data set without labels is another error
    write_data(root, three(mask), [0, 1, *range(2, 65536, 300)])
    class_map = ClassMap.from_file(root / "classes.json")
    report = check(root)
    if not report.is_clean:
        with pytest.raises(DataError) as caught:
            load_label_map(root / "masks" / "a.png", class_map)
        assert str(caught.value) in [str(finding) for finding in report.findings]
        return
    labels = load_label_map(root / "masks" / "a.png", class_map)
    counts = np.bincount(labels.ravel(), minlength=256)
    assert [entry.pixels for entry in report.classes] == (3 * counts[: len(class_map.ids)]).tolist()
    assert report.ignored_pixels == 3 * counts[255]
