from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.config import PredictConfig
from dcnseg.data.image_io import read_image, read_mask
from dcnseg.errors import ConfigError
from dcnseg.files import OUTPUT_MARKER, is_output_folder
from dcnseg.inference import batch
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import InputImage, find_inputs
from dcnseg.inference.overlay import draw_overlay
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.result_warnings import find_warnings
from dcnseg.inference.results import FileResult
from dcnseg.inference.writers import write_prediction
from tests.geotiff import random_bands, write_geotiff
from tests.tiny_network import tiny_predictor

KINDS = ("labels", "overlay", "confidence", "probabilities")


def small(path: Path, width: int = 9, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


def predict(
    predictor: Predictor, paths: Sequence[Path], out: Path, *kinds: str
) -> list[FileResult]:
    return predict_files(predictor, find_inputs(list(map(str, paths))), out, kinds or ("labels",))


def local_output(result: FileResult, kind: str) -> Path:
    path = result.outputs[kind]
    assert isinstance(path, Path)
    return path


def test_every_kind_of_output(predictor: Predictor, scenes: Path, tmp_path: Path) -> None:
    folder = scenes / "val" / "images"
    results = predict(predictor, [folder], tmp_path, *KINDS)
    assert [result.error for result in results] == [None] * 3
    for result in results:
        image = read_image(result.image.path)
        expected = predictor.predict(image, with_confidence=True, with_probabilities=True)
        assert expected.confidence is not None
        ids = read_mask(local_output(result, "labels"))
        np.testing.assert_array_equal(ids, np.array(predictor.class_map.ids)[expected.labels])
        with Image.open(local_output(result, "labels")) as file:
            assert file.mode == "P"
            colors = np.array(file.convert("RGB"))
        np.testing.assert_array_equal(colors, predictor.class_map.index_colors()[expected.labels])
        overlay = read_image(local_output(result, "overlay"))
        assert overlay.shape[1] == image.shape[1]
        assert len(overlay) > len(image)  # a legend below the image
        with Image.open(local_output(result, "confidence")) as file:
            assert file.mode == "L"
            gray = np.asarray(file) / 255
        np.testing.assert_allclose(gray, expected.confidence, atol=0.5 / 255 + 1e-6)
        with np.load(local_output(result, "probabilities")) as archive:
            np.testing.assert_array_equal(archive["probabilities"], expected.probabilities)
            np.testing.assert_array_equal(archive["probabilities"].max(0), expected.confidence)
            assert tuple(archive["names"]) == predictor.class_map.names
        assert sum(result.class_shares.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("stage", ["read", "predict", "write"])
def test_exception_in_any_stage_fails_only_its_image(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    files = [small(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    place, name = {
        "read": (InputImage, "read"),
        "predict": (predictor, "predict"),
        "write": (batch, "write_prediction"),
    }[stage]
    function = getattr(place, name)
    calls = iter(range(3))

    def fail_once(*arguments: object, **options: object) -> object:
        if next(calls) == 1:
            raise ZeroDivisionError("odd\nlines")
        return function(*arguments, **options)

    monkeypatch.setattr(batch, "ThreadPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(place, name, fail_once)
    results = predict(predictor, files, tmp_path / "out")
    text = f"{files[1]}: unexpected error: ZeroDivisionError: odd"
    assert [result.error for result in results] == [None, text, None]
    assert results[1].is_unexpected
    assert isinstance(results[1].cause, ZeroDivisionError)
    assert [result.is_predicted for result in results] == [True, False, True]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG])
def test_full_disk_stops_the_call_and_an_impossible_name_does_not(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    files = [small(tmp_path / name) for name in ("a.png", "b.png")]

    def write(
        prediction: Prediction, image: np.ndarray, paths: dict[str, Path], **options: Any
    ) -> None:
        if paths["labels"].stem == "a":
            raise OSError(number, "no")
        write_prediction(prediction, image, paths, **options)

    monkeypatch.setattr(batch, "write_prediction", write)
    first = tmp_path / "out" / "labels" / "a.png"
    if number != errno.ENAMETOOLONG:
        with pytest.raises(OSError, match="no") as caught:
            predict(predictor, files, tmp_path / "out")
        assert caught.value.filename == str(first)
        return
    results = predict(predictor, files, tmp_path / "out")
    assert results[0].error == f"{files[0]}: {first}: no"
    assert not results[0].is_unexpected
    assert results[1].is_predicted


@pytest.mark.slow
def test_sides_beyond_the_jpeg_limit(predictor: Predictor, tmp_path: Path) -> None:
    files = [small(tmp_path / "wide.png", 65501, 2), small(tmp_path / "high.png", 1, 65600)]
    results = predict(predictor, files, tmp_path / "out", "labels", "overlay")
    assert [result.error for result in results] == [None, None]
    sizes = []
    for result in results:
        for kind in ("labels", "overlay"):
            with Image.open(local_output(result, kind)) as file:
                sizes.append(file.size)
    assert [sizes[0], sizes[2], sizes[3]] == [(65501, 2), (1, 65600), (1, 65500)]
    assert sizes[1][0] == 65500  # with a legend below the image


def test_large_images_are_processed_alone(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [small(tmp_path / f"{i}.png", *((40, 30) if i in (2, 3) else (4, 3))) for i in range(7)]
    monkeypatch.setattr(batch, "LARGE_PIXELS", 40 * 30)
    events: list[tuple[str, str]] = []
    read = InputImage.read

    def note_read(image: InputImage) -> np.ndarray:
        events.append(("read", image.path.stem))
        return read(image)

    def note_write(
        prediction: Prediction, image: np.ndarray, paths: dict[str, Path], **options: Any
    ) -> None:
        events.append(("write", paths["labels"].stem))

    monkeypatch.setattr(InputImage, "read", note_read)
    monkeypatch.setattr(batch, "write_prediction", note_write)
    results = predict(predictor, files, tmp_path / "out")
    assert [result.image.path for result in results] == files
    for name in ("2", "3"):
        start, end = events.index(("read", name)), events.index(("write", name))
        before, between, after = events[:start], events[start + 1 : end], events[end + 1 :]
        assert all(what == "write" for what, _ in between)
        earlier = {stem for what, stem in before if what == "read"}
        assert not any(stem in earlier for what, stem in after if what == "write")


def test_probabilities_that_exceed_the_memory_are_an_error(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_classes = predictor.class_map.num_classes
    monkeypatch.setattr(batch, "free_memory", lambda: 2.0 * num_classes * 9 * 8)
    files = [small(tmp_path / "fits.png"), small(tmp_path / "large.png", 9, 9)]
    results = predict(predictor, files, tmp_path / "out", "probabilities")
    assert results[0].error is None
    assert f"large.png: the probabilities of {num_classes} classes for 9x9 pixels need" in str(
        results[1].error
    )
    assert "use --save confidence instead" in str(results[1].error)


def test_pixels_below_min_confidence_are_ignored(run: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    free = Predictor.from_checkpoint(run, device="cpu").predict(noise, with_confidence=True)
    assert free.confidence is not None
    least = float(np.median(free.confidence))
    predictor = Predictor.from_checkpoint(
        run, device="cpu", config=PredictConfig(min_confidence=least)
    )
    (result,) = predict(predictor, [tmp_path / "a.png"], tmp_path / "out", "labels", "overlay")
    ids = read_mask(local_output(result, "labels"))
    is_sure = ids != 255
    assert 0.2 < is_sure.mean() < 0.8
    is_clear = np.abs(free.confidence - least) > 1e-3  # float16 rounds
    np.testing.assert_array_equal(is_sure[is_clear], (free.confidence >= least)[is_clear])
    np.testing.assert_array_equal(ids[is_sure], free.label_map[is_sure])
    assert result.share_below == pytest.approx(1 - is_sure.mean(), abs=1e-5)
    assert sum(result.class_shares.values()) + result.share_below == pytest.approx(1, abs=1e-4)
    bare = draw_overlay(noise, predictor.predict(noise).labels, predictor.class_map)
    np.testing.assert_array_equal(bare[~is_sure], noise[~is_sure])
    assert (bare[is_sure] != noise[is_sure]).any()


def test_pixels_above_min_confidence_give_no_warning(predictor: Predictor, tmp_path: Path) -> None:
    (result,) = predict(predictor, [small(tmp_path / "a.png")], tmp_path / "out")
    partly = replace(result, class_shares={"amber": 0.01}, share_below=0.99)
    assert find_warnings([partly, partly], None, predictor.class_map.num_classes) == []


def test_outputs_are_not_used_as_input(predictor: Predictor, tmp_path: Path) -> None:
    """Predicts twice into a subfolder of the input, then without its marker."""
    notes: list[str] = []
    small(tmp_path / "a.png")
    small(tmp_path / "sub" / "b.png")
    out = tmp_path / "predictions"
    outputs = [out / "labels", out / "overlays"]

    def predict_all() -> None:
        inputs = find_inputs([str(tmp_path)], outputs=outputs, on_note=notes.append)
        assert [str(image.name) for image in inputs] == ["a", "sub/b"]
        predict_files(predictor, inputs, out, ("labels", "overlay"))

    predict_all()
    assert is_output_folder(out)
    predict_all()
    (out / OUTPUT_MARKER).unlink()
    with pytest.raises(ConfigError, match="is not marked as dcnseg output"):
        predict_all()
    assert notes[-1].startswith("Skipped 4 files in the output folder, for example ")


def test_output_subfolders_are_marked_in_a_folder_of_images(
    predictor: Predictor, tmp_path: Path
) -> None:
    for _ in range(2):
        predict(predictor, [small(tmp_path / "a.png")], tmp_path)
        assert not is_output_folder(tmp_path)
        assert is_output_folder(tmp_path / "labels")


@pytest.mark.parametrize("is_linked", [False, True])
def test_predictions_never_overwrite_masks(
    predictor: Predictor, tmp_path: Path, is_linked: bool
) -> None:
    inputs = find_inputs([str(small(tmp_path / "images" / "a.png"))])
    mask = small(tmp_path / "data" / "labels" / "a.png")
    before = mask.read_bytes()
    out = tmp_path / ("out" if is_linked else "data")
    if is_linked:
        out.mkdir()
        (out / "labels").symlink_to(mask.parent)
    with pytest.raises(ConfigError, match=r"labels contains files"):
        predict_files(predictor, inputs, out, ("labels",), skip_existing=True)
    assert mask.read_bytes() == before
    predict_files(predictor, inputs, out, ("overlay",))
    assert is_output_folder(out / "overlays")
    assert not is_output_folder(out)


def test_several_pages_are_a_warning(predictor: Predictor, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 8), color) for color in ("red", "blue")]
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    small(tmp_path / "e.gif")
    results = predict(predictor, [tmp_path], tmp_path / "o")
    assert [result.has_more_frames for result in results] == [True] * 4 + [False]
    (warning,) = find_warnings(results, None, 1)
    text = "4 of 5 images have several pages or frames, for example"
    assert warning == f"{text} {tmp_path / 'a.gif'}; only the first one is used."


def raster(path: Path, count: int = 3, **profile: Any) -> Path:
    return write_geotiff(path, random_bands(count), **profile)


def test_rasters_beside_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary TIFF file gets the same output as without rasterio."""
    predictor = tiny_predictor(3, PredictConfig())
    plain, png, geo = tmp_path / "plain.tif", small(tmp_path / "photo.png"), tmp_path / "geo.tif"
    raster(geo)
    pixels = read_image(geo)
    Image.fromarray(pixels).save(plain)
    windows: list[tuple[int, int]] = []
    files, out = [plain, geo, png], tmp_path / "out"
    results = predict_files(
        predictor,
        find_inputs(list(map(str, files))),
        out,
        ("labels", "confidence", "overlay"),
        on_window=lambda *call: windows.append(call),
    )
    assert [result.error for result in results] == [None] * 3
    assert [result.image.path for result in results] == files
    assert results[1].outputs == {
        "labels": out / "labels/geo.tif",
        "confidence": out / "confidence/geo.tif",
        "overlay": out / "overlays/geo.jpg",
    }
    assert windows == [(1, 1)]
    assert is_output_folder(out)
    first, second, third = (Path(str(result.outputs["labels"])) for result in results)
    assert first.suffix == third.suffix == ".png"
    np.testing.assert_array_equal(read_mask(second), read_mask(first))
    assert results[0].class_shares == results[1].class_shares
    again = predict_files(
        predictor,
        find_inputs(list(map(str, files))),
        out,
        ("labels", "confidence", "overlay"),
        skip_existing=True,
    )
    assert [result.is_skipped for result in again] == [True] * 3
    assert again[1].outputs == results[1].outputs
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (without,) = predict(predictor, [plain], tmp_path / "without", "labels", "overlay")
    for kind, path in without.outputs.items():
        assert path.read_bytes() == results[0].outputs[kind].read_bytes()


def test_bands_of_rasters(tmp_path: Path) -> None:
    predictor = tiny_predictor(3, PredictConfig())
    raster(tmp_path / "five.tif", 5)
    inputs = find_inputs([str(tmp_path)])
    (failed,) = predict_files(predictor, inputs, tmp_path / "out", ("labels",))
    assert "five.tif: has 5 bands; choose those for red" in str(failed.error)
    assert not (tmp_path / "out").exists()
    (result,) = predict_files(predictor, inputs, tmp_path / "out", ("labels",), bands=(5, 1, 4))
    assert result.error is None
    with pytest.raises(ConfigError, match="--bands is '1,2'"):
        predict_files(predictor, inputs, tmp_path / "out", ("labels",), bands=(1, 2))


def test_bad_raster_costs_only_itself(tmp_path: Path) -> None:
    predictor = tiny_predictor(3, PredictConfig())
    files = [raster(tmp_path / f"{i}.tif", compress="lzw") for i in range(2)]
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) - 1000] + bytes(1000))
    results = predict(predictor, [*files, tmp_path / "missing.tif"], tmp_path / "out")
    assert "0.tif: cannot be decoded; the file is damaged" in str(results[0].error)
    assert not results[0].is_unexpected
    assert results[1].is_predicted
    assert "missing.tif: does not exist." in str(results[2].error)


def test_images_that_are_too_large_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = tiny_predictor(3, PredictConfig())
    geo, plain = raster(tmp_path / "geo.tif"), tmp_path / "plain.tif"
    Image.fromarray(read_image(geo)).save(plain)
    whole = predict(predictor, [geo], tmp_path / "whole", "labels", "probabilities")
    assert whole[0].outputs["labels"].name == "geo.png"  # small enough for probabilities
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    results = predict(predictor, [geo, plain], tmp_path / "out")
    names = [result.outputs["labels"].name for result in results]
    assert names == ["geo.tif", "plain.tif"]
    (failed,) = predict(predictor, [plain], tmp_path / "no", "labels", "probabilities")
    assert "plain.tif: the image is predicted window by window; prob" in str(failed.error)
    assert not (tmp_path / "no").exists()
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (failed,) = predict(predictor, [plain], tmp_path / "no")
    assert "plain.tif: refused" in str(failed.error)
    assert 'pip install "dcnseg[geo]"' in str(failed.error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_full_disk_during_a_raster_stops_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    predictor = tiny_predictor(3, PredictConfig())
    files = [raster(tmp_path / f"{i}.tif") for i in range(2)]

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(batch, "predict_raster", fail)
    if number == errno.ENOSPC:
        with pytest.raises(OSError, match="no"):
            predict(predictor, files, tmp_path / "out")
    else:
        results = predict(predictor, files, tmp_path / "out")
        label_map = tmp_path / "out" / "labels" / "0.tif"
        assert results[0].error == f"{files[0]}: {label_map}: no"


def test_raster_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = tiny_predictor(3, PredictConfig())

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(batch, "predict_raster", fail)
    (result,) = predict(predictor, [raster(tmp_path / "image.tif")], tmp_path / "out")
    assert "image.tif: out of memory on cpu for an image of 70x60 pixels" in str(result.error)
