"""Predictions as files: label maps, overlays and probabilities; entry point `write_prediction`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.data.image_io import write_jpeg, write_png
from dcnseg.errors import ConfigError
from dcnseg.files import atomic_path
from dcnseg.inference.predictor import Prediction

OUTPUT_KINDS = ("labels", "overlay", "probabilities")
OVERLAY_OPACITY = 0.55


def check_output_kinds(kinds: Collection[str]) -> None:
    """Raise a ConfigError that names the first kind that is not one of OUTPUT_KINDS, or none."""
    if not kinds:
        raise ConfigError(f"--save is empty; expected some of {', '.join(OUTPUT_KINDS)}.")
    for kind in kinds:
        if kind not in OUTPUT_KINDS:
            raise ConfigError(f"--save is {kind!r}; expected some of {', '.join(OUTPUT_KINDS)}.")


def output_paths(folder: Path, name: PurePath, kinds: Collection[str]) -> dict[str, Path]:
    """Where `write_prediction` writes each kind of output of the picture `name`."""
    places = {
        "labels": folder / "labels" / f"{name}.png",
        "overlay": folder / "overlays" / f"{name}.jpg",
        "probabilities": folder / "probabilities" / f"{name}.npz",
    }
    return {kind: places[kind] for kind in OUTPUT_KINDS if kind in kinds}


def write_prediction(
    prediction: Prediction,
    image: npt.NDArray[np.uint8],
    class_map: ClassMap,
    paths: dict[str, Path],
) -> None:
    """Write the outputs of one picture; each file appears whole or not at all.

    Args:
        prediction: Labels of the picture, and probabilities if they are to be written.
        image: The picture, RGB uint8 [H, W, 3].
        class_map: Ids and colours of the classes.
        paths: Where to write which kind, from `output_paths`.
    """
    if "overlay" in paths:
        write_jpeg(paths["overlay"], draw_overlay(image, prediction.labels, class_map))
    if "probabilities" in paths:
        assert prediction.probabilities is not None
        _write_probabilities(paths["probabilities"], prediction.probabilities, class_map)
    if "labels" in paths:  # last: a label map that is there says that the picture is done
        ids = class_map.decode_indices(prediction.labels)
        write_png(paths["labels"], ids, palette=class_map.palette())


def draw_overlay(
    image: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], class_map: ClassMap
) -> npt.NDArray[np.uint8]:
    """The picture with the classes' colours over it, uint8 [H, W, 3]; ignored pixels stay bare."""
    colours = np.zeros((256, 3), np.float32)
    colours[: class_map.num_classes] = class_map.index_colours()
    opacity = np.zeros((256, 1), np.float32)
    opacity[: class_map.num_classes] = OVERLAY_OPACITY
    blended = image * (1 - opacity)[labels] + (colours * opacity)[labels]
    return np.rint(blended).astype(np.uint8)


def _write_probabilities(
    path: Path, probabilities: npt.NDArray[np.float16], class_map: ClassMap
) -> None:
    with atomic_path(path) as temporary:
        np.savez_compressed(
            temporary,
            probabilities=probabilities,
            ids=np.array(class_map.ids),
            names=np.array(class_map.names),
        )
