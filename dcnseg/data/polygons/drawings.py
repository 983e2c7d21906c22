"""Draws masks from polygons in LabelMe or COCO files.

The entry points are `rasterize`, `load_polygons` and `polygon_names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap, UnknownLabelsError
from dcnseg.data.image_io import read_size
from dcnseg.data.label_codes import UInt8Array
from dcnseg.data.polygons.coco_file import CocoFile, read_coco
from dcnseg.data.polygons.labelme import looks_like_labelme, parse_labelme
from dcnseg.data.polygons.shapes import Annotation, draw_shape
from dcnseg.data.sample import FileProblem, Sample
from dcnseg.errors import DataError, short_repr

BACKGROUND: Final = "background"
_BACKGROUND_NAMES: Final = ("background", "_background_", "__background__", "bg")


def is_polygon_file(path: Path) -> bool:
    """Whether a mask is a file of polygons, by its suffix."""
    return path.suffix.lower() == ".json"


def load_polygons(sample: Sample, class_map: ClassMap) -> UInt8Array:
    """Return the training indices of an image whose annotation is polygons, uint8 [H, W].

    Raises:
        DataError: As `rasterize`; also if the file has invalid entries for any image.
    """
    try:
        content = _read_file(sample.mask)
        if isinstance(content, CocoFile) and content.problems:
            rest = len(content.problems) - 1
            more = f" `dcnseg check` lists {rest} more problems." if rest else ""
            raise DataError(f"{content.path}: {content.problems[0]}{more}")
        return class_map.encode_ids(_draw(content, sample, class_map.ids_by_name))
    except UnknownLabelsError as error:
        raise DataError(f"{sample.mask}: {error}") from error


def rasterize(sample: Sample, ids: Mapping[str, int]) -> npt.NDArray[np.int32]:
    """Return the mask of an image whose annotation is polygons, ids int32 [H, W].

    A pixel belongs to the last shape that contains its center.

    Args:
        sample: An image, and the LabelMe or COCO file that annotates it.
        ids: Id of each class by its name. Pixels outside all shapes get that of "background".

    Raises:
        DataError: The file is damaged or its image size differs from that of the displayed image, a
            label is not a class, or pixels are outside all shapes and no class is "background".
    """
    return _draw(_read_file(sample.mask), sample, ids)


def _draw(
    content: CocoFile | Annotation, sample: Sample, ids: Mapping[str, int]
) -> npt.NDArray[np.int32]:
    if isinstance(content, CocoFile):
        content = content.annotation_of(sample.image)
    size_hw = read_size(sample.image)
    if content.size_hw not in (None, size_hw):
        assert content.size_hw is not None
        height, width = content.size_hw
        hint = " The image has an EXIF rotation." if (width, height) == size_hw else ""
        raise DataError(
            f"{sample.mask}: its polygons are for {width}x{height} pixels, but "
            f"{sample.image.name} is displayed as {size_hw[1]}x{size_hw[0]}.{hint} Annotate the "
            "image as displayed."
        )
    canvas = np.full(size_hw, -1, np.int32)
    for shape in content.shapes:
        if shape.name not in ids and not is_background(shape.name):
            raise DataError(
                f"{sample.mask}: has the label {short_repr(shape.name)}; the classes are "
                f"{', '.join(ids)}. Add a class, or an `ignore` entry with this name."
            )
        draw_shape(canvas, shape, ids.get(shape.name, -1))
    is_free = canvas < 0
    background = [number for name, number in ids.items() if is_background(name)]
    if not background and is_free.any():
        raise DataError(
            f"{sample.mask}: {int(is_free.sum())} pixels of {sample.image.name} are outside all "
            f'polygons, and no class is named {BACKGROUND}. Add {{"id": ..., "name": '
            f'"{BACKGROUND}"}} to the classes, or to `ignore`.'
        )
    if background:
        canvas[is_free] = background[0]
    return canvas


def polygon_names(paths: Iterable[Path]) -> tuple[list[str], list[FileProblem]]:
    """Return the class names in files of polygons: "background", then all others.

    Names of COCO files come in the order of their ids, then those of LabelMe files alphabetically.
    Files that cannot be read are returned as problems.
    """
    numbered: set[tuple[int, str]] = set()
    labels: set[str] = set()
    problems: list[FileProblem] = []
    for path in sorted(path for path in set(paths) if is_polygon_file(path)):
        try:
            content = _read_file(path)
        except DataError as error:
            problems.append(FileProblem(path, str(error).removeprefix(f"{path}: ")))
            continue
        if isinstance(content, CocoFile):
            numbered |= set(content.names.items())
            problems += [FileProblem(path, what) for what in content.problems]
        else:
            labels |= {shape.name for shape in content.shapes}
    in_order = [*(name for _, name in sorted(numbered)), *sorted(labels)]
    names = dict.fromkeys([BACKGROUND, *(n for n in in_order if not is_background(n))])
    return list(names), problems


def is_background(name: str) -> bool:
    """Whether a class name denotes the pixels outside all shapes."""
    return name.lower() in _BACKGROUND_NAMES


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
