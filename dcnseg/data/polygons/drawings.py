"""Masks that are given as polygons, in LabelMe or COCO files.

The entry points are `rasterise`, `load_polygons` and `polygon_classes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_info import with_colours
from dcnseg.data.class_map import ClassMap, UnknownLabelsError
from dcnseg.data.image_io import read_size
from dcnseg.data.label_codes import UInt8Array
from dcnseg.data.pairing.samples import Sample
from dcnseg.data.polygons.coco import CocoFile, read_coco
from dcnseg.data.polygons.labelme import looks_like_labelme, parse_labelme
from dcnseg.data.polygons.shapes import Annotation, draw_shape
from dcnseg.errors import DataError

BACKGROUND: Final = "background"
_BACKGROUND_NAMES: Final = ("background", "_background_", "__background__", "bg")


def is_polygon_file(path: Path) -> bool:
    """Whether a mask is a file of polygons, by its ending."""
    return path.suffix.lower() == ".json"


def load_polygons(sample: Sample, class_map: ClassMap) -> UInt8Array:
    """Return the training indices of a picture whose annotation is polygons, uint8 [H, W].

    Raises:
        DataError: As `rasterise`.
    """
    try:
        return class_map.encode_ids(rasterise(sample, class_map.ids_by_name))
    except UnknownLabelsError as error:
        raise DataError(f"{sample.mask}: {error}") from error


def polygon_classes(samples: Sequence[Sample]) -> ClassMap:
    """Make classes of the names in files of polygons, with the ids 0, 1, 2, ...

    Raises:
        DataError: A file is damaged, or some of the masks are pictures.
        ConfigError: There are more than 255 names.
    """
    picture = next((sample.mask for sample in samples if not is_polygon_file(sample.mask)), None)
    if picture:
        raise DataError(
            f"{picture}: is a picture, but other masks are polygons. Write classes.json, so that "
            "ids and names mean the same."
        )
    names = polygon_names(samples)
    if len(names) < 2:
        raise DataError(f"{samples[0].mask}: no polygon has a label; there is nothing to learn.")
    entries = [(number, name, None) for number, name in enumerate(names)]
    return ClassMap(with_colours(entries), (), "the polygons' labels")


def rasterise(sample: Sample, ids: Mapping[str, int]) -> npt.NDArray[np.int32]:
    """Return the mask of a picture whose annotation is polygons, ids int32 [H, W].

    A pixel belongs to the last shape that its centre lies in. The size is the one that the file
    gives for the picture as displayed, else the picture's own.

    Args:
        sample: A picture, and the LabelMe or COCO file that tells of it.
        ids: Id of each class by its name. Pixels in no shape get that of "background".

    Raises:
        DataError: The file is damaged or gives another size than the picture's, a label is no
            class, or pixels are in no shape and no class is called background.
    """
    annotation = _read_annotation(sample)
    size_hw = read_size(sample.image)
    if annotation.size_hw not in (None, size_hw):
        assert annotation.size_hw is not None
        height, width = annotation.size_hw
        hint = " The picture is turned by EXIF." if (width, height) == size_hw else ""
        raise DataError(
            f"{sample.mask}: its polygons are for {width}x{height} pixels, but "
            f"{sample.image.name} is displayed as {size_hw[1]}x{size_hw[0]}.{hint} Annotate the "
            "picture as displayed."
        )
    canvas = np.full(size_hw, -1, np.int32)
    for shape in annotation.shapes:
        if shape.name not in ids and not is_background(shape.name):
            raise DataError(
                f"{sample.mask}: has the label {shape.name!r}; the classes are "
                f"{', '.join(ids)}. Add a class, or an `ignore` entry of that name."
            )
        draw_shape(canvas, shape, ids.get(shape.name, -1))
    _fill_background(canvas, sample, ids)
    return canvas


def polygon_names(samples: Iterable[Sample]) -> list[str]:
    """Return the class names in the files of polygons: "background", then all others.

    Those of COCO files come in the order of their ids, then those of LabelMe files by alphabet.

    Raises:
        DataError: A file is damaged.
    """
    numbered: set[tuple[int, str]] = set()
    labels: set[str] = set()
    for path in sorted({sample.mask for sample in samples}):
        content = _read_file(path)
        if isinstance(content, CocoFile):
            numbered |= set(content.names.items())
        else:
            labels |= {shape.name for shape in content.shapes}
    in_order = [*(name for _, name in sorted(numbered)), *sorted(labels)]
    return list(dict.fromkeys([BACKGROUND, *(n for n in in_order if not is_background(n))]))


def is_background(name: str) -> bool:
    """Whether a class name means the pixels outside all shapes."""
    return name.lower() in _BACKGROUND_NAMES


def _fill_background(canvas: npt.NDArray[np.int32], sample: Sample, ids: Mapping[str, int]) -> None:
    is_free = canvas < 0
    if not is_free.any():
        return
    number = next((ids[name] for name in ids if is_background(name)), None)
    if number is None:
        raise DataError(
            f"{sample.mask}: {int(is_free.sum())} pixels of {sample.image.name} are in no polygon, "
            f'and no class is called {BACKGROUND}. Add {{"id": ..., "name": "{BACKGROUND}"}} to '
            "the classes, or to `ignore`."
        )
    canvas[is_free] = number


def _read_annotation(sample: Sample) -> Annotation:
    content = _read_file(sample.mask)
    return content.annotation_of(sample.image) if isinstance(content, CocoFile) else content


def _read_file(path: Path) -> CocoFile | Annotation:
    content = read_coco(path)
    if isinstance(content, CocoFile):
        return content
    if looks_like_labelme(content):
        return parse_labelme(content, path)
    raise DataError(
        f'{path}: is neither a LabelMe file ("shapes") nor a COCO file ("images", "annotations" '
        'and "categories").'
    )
