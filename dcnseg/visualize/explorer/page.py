"""The explorer: where a network looks from each point of an image, as one HTML file.

Entry points: `write_explorer`, and `write_gallery` for the pages of several images.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import cv2
import jinja2
import numpy as np
from markupsafe import Markup

from dcnseg import __version__
from dcnseg.data.class_map import ClassMap
from dcnseg.errors import NotFiniteError, ShapeError
from dcnseg.files import atomic_path
from dcnseg.inference.predictor import Predictor
from dcnseg.visualize.explorer.payload import (
    UInt8Array,
    compute_error_px,
    make_payload,
    select_layers,
)
from dcnseg.visualize.offsets import CASCADE_DEPTH, LayerOffsets, capture_offsets, limit_size
from dcnseg.visualize.points import Point, choose_points

MAX_IMAGE_SIDE: Final = 1600  # pixels of the embedded image
THUMBNAIL_SIDE: Final = 360
JPEG_QUALITY: Final = 92
# In this order: a module imports only from those before it.
MODULES: Final = (
    *("data", "sampling", "measures", "colors", "heat", "state", "base", "view"),
    *("readout", "explorer", "controls", "main"),
)

_ASSETS: Final = Path(__file__).parent / "assets"
_ENVIRONMENT: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_ASSETS),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class ExplorerContent:
    """What an explorer page shows.

    Attributes:
        title: For example the name of the image.
        image: RGB, uint8 [H, W, 3].
        layers: The deformable layers in forward order.
        class_map: Names and colors of the classes.
        prediction: Predicted training indices, uint8 [H, W]; None if there are none.
        labels: True training indices, uint8 [H, W], 255 where ignored; None if unknown.
        pins: Points (x, y) in image pixels that are pinned at the start.
        is_cascade: Whether points are traced in cascade at the start.
        gallery: The gallery's URL relative to the page, or "".
    """

    title: str
    image: UInt8Array
    layers: Sequence[LayerOffsets]
    class_map: ClassMap
    prediction: UInt8Array | None = None
    labels: UInt8Array | None = None
    pins: Sequence[Point] = ()
    is_cascade: bool = False
    gallery: str = ""


@dataclass(frozen=True)
class GalleryEntry:
    """A page in a gallery: its title, its file, and its image (RGB, uint8 [H, W, 3])."""

    title: str
    page: Path
    thumbnail: UInt8Array


def write_explorer(
    path: Path,
    predictor: Predictor,
    image: UInt8Array,
    *,
    labels: UInt8Array | None = None,
    title: str,
    pins: Sequence[Point] = (),
    is_cascade: bool = False,
    gallery: str = "",
) -> None:
    """Write a page to explore the offsets of all deformable layers for one image.

    The page is one HTML file that needs no server, no network and no other file.

    Args:
        path: The HTML file; it appears whole.
        predictor: A predictor whose network has deformable layers.
        image: RGB, uint8 [H, W, 3].
        labels: Training indices, uint8 [H, W], 255 where ignored; None if unknown.
        title: For example the name of the image.
        pins: Points (x, y) in image pixels that are pinned at the start.
        is_cascade: Whether points are traced in cascade at the start.
        gallery: The URL of a gallery relative to the page, or "".

    Raises:
        ConfigError: The network has no deformable layer.
        ShapeError: `image` or `labels` has another shape or dtype.
    """
    network_input = limit_size(predictor.prepare(image))
    layers = capture_offsets(predictor.model, network_input, (image.shape[0], image.shape[1]))
    try:
        prediction = predictor.predict(image).labels
    except NotFiniteError:  # the offsets may still tell why
        prediction = None
    content = ExplorerContent(
        title,
        image,
        layers,
        predictor.class_map,
        prediction,
        labels,
        pins=pins,
        is_cascade=is_cascade,
        gallery=gallery,
    )
    write_explorer_page(path, content)


def write_explorer_page(path: Path, content: ExplorerContent) -> None:
    """Write the page of captured offsets; see `write_explorer`.

    Raises:
        ShapeError: The prediction or the labels are not uint8 of the size of the image.
    """
    size_hw = content.image.shape[:2]
    for name, labels in (("prediction", content.prediction), ("labels", content.labels)):
        if labels is not None and (labels.shape != size_hw or labels.dtype != np.uint8):
            raise ShapeError(
                f"`{name}` is {labels.dtype} {list(labels.shape)}; expected uint8 {list(size_hw)}, "
                "the size of the image."
            )
    layers = select_layers(content.layers)
    values, blob = make_payload(layers, content.class_map, content.prediction, content.labels)
    values["image"] = {"height": size_hw[0], "width": size_hw[1]}
    values["point"] = _choose_point(content)
    values["pins"] = [list(pin) for pin in content.pins]
    values["cascade"] = content.is_cascade
    _render(
        path,
        "explorer.html",
        {
            "title": content.title,
            "subtitle": _describe(content),
            "gallery": content.gallery,
            "photo": _to_data_url(content.image, MAX_IMAGE_SIDE),
            "values": values,
            "blob": blob,
            "script": Markup(bundle_modules()),
            "cascade_depth": CASCADE_DEPTH,
            "is_modulated": any(layer.mask is not None for layer in layers),
            "has_dilation": any(layer.grid.num_taps > 1 for layer in layers),
            "num_omitted": len(content.layers) - len(layers),
            "error_px": f"{max(compute_error_px(layers), 0.001):.3f}",
        },
    )


def write_gallery(path: Path, entries: Sequence[GalleryEntry], *, title: str) -> None:
    """Write a page with a thumbnail and a link for each explorer page, below the same folder."""
    cards = [
        {
            "title": entry.title,
            "url": quote(entry.page.relative_to(path.parent).as_posix()),
            "thumbnail": _to_data_url(entry.thumbnail, THUMBNAIL_SIDE),
        }
        for entry in entries
    ]
    _render(path, "gallery.html", {"title": title, "cards": cards})


def make_thumbnail(image: UInt8Array) -> UInt8Array:
    """Scale an image down for `GalleryEntry`."""
    return _shrink(image, THUMBNAIL_SIDE)


def bundle_modules() -> str:
    """Return the JavaScript modules as one script.

    A module has its imports and exports on lines of their own, and no name at its top level occurs
    in another module, so that leaving out `import ...` and `export` gives one scope.
    """
    sources = [(_ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in MODULES]
    script = "\n".join(sources).replace("// @ts-check\n", "")
    script = re.sub(r"^import [^;]*;\n", "", script, flags=re.MULTILINE)
    return re.sub(r"^export (?=(async )?(function|const|class) )", "", script, flags=re.MULTILINE)


def _render(path: Path, template: str, values: dict[str, Any]) -> None:
    style = Markup((_ASSETS / "explorer.css").read_text(encoding="utf-8"))
    text = _ENVIRONMENT.get_template(template).render(values, style=style, version=__version__)
    with atomic_path(path, is_durable=False) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _choose_point(content: ExplorerContent) -> Point:
    """The innermost pixel of the largest object, or the middle of the image."""
    labels = content.labels if content.labels is not None else content.prediction
    if labels is not None:
        largest = choose_points(labels, content.class_map)[-1]
        if largest.name:
            return largest.xy
    height, width = content.image.shape[:2]
    return (width - 1) / 2, (height - 1) / 2


def _describe(content: ExplorerContent) -> str:
    height, width = content.image.shape[:2]
    count = len(content.layers)
    version = "v2" if any(layer.mask is not None for layer in content.layers) else "v1"
    plural = "s" if count != 1 else ""
    return (
        f"{width} \N{MULTIPLICATION SIGN} {height} px, {count} deformable layer{plural} ({version})"
    )


def _shrink(image: UInt8Array, side: int) -> UInt8Array:
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _to_data_url(image: UInt8Array, side: int) -> str:
    small = cv2.cvtColor(_shrink(image, side), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
