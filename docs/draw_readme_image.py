"""Draw docs/images/scene.jpg from a folder that `dcnseg demo` wrote.

    python docs/draw_readme_image.py demo 12 45,60

The arguments are the demo's folder, the number of a validation scene, and a pixel (x, y) of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dcnseg.data.image_io import read_image, write_jpeg
from dcnseg.inference.overlay import draw_overlay
from dcnseg.inference.predictor import Predictor
from dcnseg.visualize.canvas import Panel, compose
from dcnseg.visualize.offsets import capture_offsets, trace_cascade

IMAGE = Path(__file__).parent / "images" / "scene.jpg"
GREEN, RED, WHITE = (40, 220, 90), (230, 30, 30), (255, 255, 255)


def draw(demo: Path, scene: int, point_xy: tuple[float, float]) -> None:
    """Put the scene, its segmentation and the samples of one point side by side."""
    image = read_image(demo / "scenes" / "val" / "images" / f"scene_{scene:04}.jpg")
    predictor = Predictor.from_checkpoint(demo / "run", device="cpu")
    overlay = draw_overlay(image, predictor.predict(image).labels, predictor.class_map)
    height, width = image.shape[:2]
    layers = capture_offsets(predictor.model, predictor.prepare(image), (height, width))
    panels = [
        ("Image", Panel.from_image(image).canvas),
        ("Segmentation", Panel.from_image(overlay).canvas),
    ]
    for title, is_plain in (("Plain sampling", True), ("Deformable sampling", False)):
        panel = Panel.from_image(image)
        for depth, radius in ((2, 2.5), (1, 6.0)):
            samples = trace_cascade(layers[-depth:], point_xy, is_plain=is_plain)
            panel.dots(samples.positions_xy.numpy(), radius, RED, WHITE)
        panel.square(samples.location_xy, 9.0, GREEN)
        panels.append((title, panel.canvas))
    title = "dcnseg on a generated scene"
    notes = ["Large dots: the 9 samples of the last deformable layer at the green square."]
    notes.append("Small dots: the 81 samples of the last two layers.")
    write_jpeg(IMAGE, compose(panels, 2, title, notes))


if __name__ == "__main__":
    x, y = sys.argv[3].split(",")
    draw(Path(sys.argv[1]), int(sys.argv[2]), (float(x), float(y)))
