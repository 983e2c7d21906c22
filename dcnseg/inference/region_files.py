"""Regions in COCO's formats; entry points `write_region_results` and `merge_region_results`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from dcnseg import __version__
from dcnseg.data.class_map import ClassMap
from dcnseg.errors import DataError
from dcnseg.files import atomic_path, explain_unreadable, read_json
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.remote_files import AnyPath, local_copy, local_outputs
from dcnseg.inference.results import FileResult

MERGED_REGIONS: Final = "regions.json"
DIGITS: Final = 5  # of scores

RunLengths = dict[str, Any]


def to_coco_results(prediction: Prediction, image_id: int) -> list[dict[str, Any]]:
    """Return the regions of an image as a COCO results list.

    Besides the fields of COCO, an entry has the refined box, the area, the mean confidence, and the
    class that the region head votes for (None for "no object") with its score.

    Args:
        prediction: A prediction with regions.
        image_id: The id of the image.
    """
    regions, numbers = prediction.require_regions()
    ids = prediction.class_map.ids
    results = []
    for number, region in enumerate(regions, 1):
        left, top, right, bottom = region.box_xyxy
        is_region = numbers[top:bottom, left:right] == number
        voted = region.voted_index
        results.append(
            {
                "image_id": image_id,
                "category_id": ids[region.class_index],
                "score": round(region.score, DIGITS),
                "bbox": _to_xywh(region.box_xyxy),
                "refined_bbox": _to_xywh(region.refined_box_xyxy),
                "area": region.area,
                "segmentation": encode_mask(is_region, (top, left), numbers.shape),
                "confidence": round(region.confidence, DIGITS),
                "voted_category_id": None if voted is None else ids[voted],
                "voted_score": round(region.voted_score, DIGITS),
            }
        )
    return results


def encode_mask(
    mask: npt.NDArray[np.bool_], corner: Sequence[int], size_hw: Sequence[int]
) -> RunLengths:
    """Encode a mask as COCO's compressed run lengths, without making it as large as the image.

    Args:
        mask: Part of the image that contains all its pixels, bool [h, w].
        corner: Row and column of the mask's first pixel in the image.
        size_hw: The size of the image.
    """
    height, width = size_hw
    columns = np.pad(mask.T, ((0, 0), (1, 1)))  # [w, 1 + h + 1]: COCO counts column by column
    change = np.diff(columns.astype(np.int8), axis=1)
    (column, start), (_, end) = (np.nonzero(change == sign) for sign in (1, -1))
    first = (corner[1] + column) * height + corner[0]
    # A position that is the end of a run and the start of the next is within one run: the first
    # column goes down to the last row, the second starts in the first row.
    edges, counts = np.unique(np.concatenate([first + start, first + end]), return_counts=True)
    edges = edges[(counts == 1) & (edges < height * width)]
    lengths = np.diff(edges, prepend=0, append=height * width).tolist()
    encoded = coco_mask.frPyObjects({"counts": lengths, "size": [height, width]}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def write_region_results(path: Path, prediction: Prediction, image_id: int) -> None:
    """Write the COCO results file of one image atomically."""
    _write_json(path, to_coco_results(prediction, image_id))


def merge_region_results(
    path: AnyPath, results: Mapping[int, FileResult], class_map: ClassMap
) -> None:
    """Write the regions of all images that have a results file as one COCO data set.

    Results files of earlier calls, which may have had other images, get the ids of this one.

    Args:
        path: The file to write. The ids of regions count from 1, in the order of the images.
        results: The results by the ids of their images.
        class_map: The classes.

    Raises:
        DataError: A results file of an earlier call is damaged, or the size of an image without
            regions is needed and cannot be read.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, result in sorted(results.items()):
        if "regions" not in result.outputs:
            continue
        own_path = result.outputs["regions"]
        entries = _read_results(own_path)
        height, width = _find_size(result, entries)
        name = str(result.image)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        current = [{**entry, "image_id": image_id} for entry in entries]
        if current != entries:
            _write_json(own_path, current)
        annotations += [
            {**entry, "id": number, "iscrowd": 0}
            for number, entry in enumerate(current, len(annotations) + 1)
        ]
    categories = [{"id": entry.id, "name": entry.name} for entry in class_map.classes]
    _write_json(
        path,
        {
            "info": {"description": f"Regions predicted by dcnseg {__version__}"},
            "images": images,
            "categories": categories,
            "annotations": annotations,
        },
    )


def _read_results(path: AnyPath) -> list[dict[str, Any]]:
    try:
        with local_copy(path) as local, explain_unreadable(local, "a file of regions"):
            entries = read_json(local)
            if not isinstance(entries, list) or not all(map(_is_result, entries)):
                raise ValueError("it has another form than COCO results with run lengths")
    except DataError as error:
        raise DataError(f"{error} Delete it, and predict its image again.") from error
    return entries


def _is_result(entry: Any) -> bool:
    """Whether this has the fields of `to_coco_results` that regions.json relies on."""
    if not isinstance(entry, dict) or not {"category_id", "bbox", "area"} <= entry.keys():
        return False
    segmentation = entry.get("segmentation")
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    return isinstance(size, list) and len(size) == 2


def _find_size(result: FileResult, entries: Sequence[dict[str, Any]]) -> Sequence[int]:
    """The height and width of an image, which may have been skipped."""
    if result.is_predicted:
        return result.size_hw
    size: Sequence[int] = entries[0]["segmentation"]["size"] if entries else ()
    return size or result.image.read().shape[:2]


def _to_xywh(box_xyxy: Sequence[float]) -> list[float]:
    left, top, right, bottom = box_xyxy
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]


def _write_json(path: AnyPath, content: Any) -> None:
    with local_outputs({"json": path}) as local, atomic_path(local["json"]) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
