"""Draw docs/images/scene.jpg: the summary of a generated scene.

    python docs/draw_readme_image.py demo/run demo/scenes/val/images/scene_0012.jpg

The arguments are a run folder and an image.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dcnseg.data.image_io import read_image, write_jpeg
from dcnseg.inference.predictor import Predictor
from dcnseg.visualize.charts import chart_to_rgb
from dcnseg.visualize.figures.summary import draw_summary
from dcnseg.visualize.points import choose_points
from dcnseg.visualize.run import view_image

IMAGE = Path(__file__).parent / "images" / "scene.jpg"


def draw(run: Path, scene: Path) -> None:
    """Draw the summary of an image with automatically chosen points."""
    image = read_image(scene)
    view, _ = view_image(Predictor.from_checkpoint(run, device="cpu"), image, "dcnseg")
    points = choose_points(view.labels, view.class_map)
    write_jpeg(IMAGE, chart_to_rgb(draw_summary(image, [view], points, "A generated scene")))


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
