"""HTML pages from the templates; entry point `write_page`."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import cv2
import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

from dcnseg.data.image_io import read_image
from dcnseg.files import atomic_path
from dcnseg.visualize.charts import chart_to_svg

MAX_IMAGE_SIDE: Final = 1600  # pixels of an embedded image
JPEG_QUALITY: Final = 85

_ENVIRONMENT: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Render a template into one HTML file that needs no network and no other file.

    Args:
        path: The HTML file; it appears whole.
        template: File name in the folder `templates`.
        content: Values of the template; strings are escaped unless they are `Markup`.
    """
    text = _ENVIRONMENT.get_template(template).render(content)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def embed_chart(figure: Figure, label: str) -> Markup:
    """Return a chart as SVG in the page's text color; `label` is for screen readers."""
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = chart_to_svg(figure, label)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)  # ids are unique in the page
    return Markup(svg)


def embed_image(image: npt.NDArray[np.uint8], label: str) -> Markup:
    """Return an RGB image [H, W, 3] as a JPEG in an `img` element."""
    scale = min(1.0, MAX_IMAGE_SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    if scale < 1:
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    url = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
    element = '<img alt="{}" width="{}" height="{}" src="{}">'
    return Markup(element).format(label, *size, url)


def embed_image_file(path: Path, label: str) -> Markup | None:
    """Return an image file as `embed_image` does, or None if it does not exist."""
    return embed_image(read_image(path), label) if path.is_file() else None
