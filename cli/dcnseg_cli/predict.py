"""`dcnseg predict`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnseg.config import OVERLAY_OPACITY, PredictConfig
from dcnseg.errors import ConfigError
from dcnseg.inference.remote_files import to_path
from dcnseg_cli.options import (
    AmpOption,
    DeviceOption,
    FlipOption,
    ImagesArgument,
    JsonOption,
    MinRegionScoreOption,
    ModelArgument,
    OverlapOption,
    OverwriteOption,
    ScalesOption,
    WindowOption,
    check_out_folder,
    choice_option,
    comma_list,
    parse_integers,
    parse_numbers,
)
from dcnseg_cli.reporting import DATA, DEBUG_VARIABLE, echo, message, print_json, report_errors

if TYPE_CHECKING:
    from dcnseg.inference.results import FileResult

ENGINES = ("local", "ray")
EPILOG = """
Examples:

  dcnseg predict runs/photos holiday/*.jpg --out predictions

  dcnseg predict runs/photos holiday --out predictions --skip-existing

  dcnseg predict model.onnx holiday --out predictions

  dcnseg predict runs/photos s3://bucket/images --out s3://bucket/predictions --engine ray

  dcnseg predict runs/land orthophoto.tif --out predictions --bands 4,3,2

  find . -name '*.png' | dcnseg predict runs/photos - --out predictions --save labels,probabilities
"""


@report_errors
def predict(
    run: ModelArgument,
    images: ImagesArgument,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="Output folder, or a URL that fsspec can write to, such as s3://bucket/folder.",
            rich_help_panel="Output",
        ),
    ],
    save: Annotated[
        str,
        typer.Option(
            help="Outputs to write: labels (PNG of class ids), overlay (JPEG), confidence (PNG: "
            "probability of the predicted class times 255), probabilities (npz), regions (JSON: "
            "COCO results; needs a network with a region head).",
            rich_help_panel="Output",
        ),
    ] = "labels,overlay",
    overwrite: OverwriteOption = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Skip images whose outputs all exist in the output folder.",
            rich_help_panel="Output",
        ),
    ] = False,
    opacity: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Opacity of the colors of overlays, from 0 (outlines only) to 1.",
            rich_help_panel="Output",
        ),
    ] = OVERLAY_OPACITY,
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Predict only part K of N of the images, from 1/N to N/N. Several parts can write "
            "to the same output folder at once.",
            rich_help_panel="Machine",
        ),
    ] = "",
    min_confidence: Annotated[
        float,
        typer.Option(
            help="Set pixels with a confidence below this value (0 to 1) to the ignored id (255).",
            rich_help_panel="Inference",
        ),
    ] = PredictConfig.min_confidence,
    min_region_score: MinRegionScoreOption = PredictConfig.min_region_score,
    window: WindowOption = PredictConfig.window,
    overlap: OverlapOption = PredictConfig.overlap,
    flip: FlipOption = PredictConfig.flip,
    scales: ScalesOption = comma_list(PredictConfig.scales),
    bands: Annotated[
        str,
        typer.Option(
            help="Bands of the images for red, green and blue, counted from 1, such as 4,3,2; "
            "needed for images with more than three colors. Needs rasterio (dcnseg[geo]).",
            show_default="the first three",
            rich_help_panel="Inference",
        ),
    ] = "",
    device: DeviceOption = "auto",
    amp: AmpOption = "off",
    engine: Annotated[
        str,
        choice_option(
            "Where to predict: local is this process, ray a Ray cluster (the one that RAY_ADDRESS "
            "names, or one on this machine).",
            ENGINES,
            panel="Machine",
        ),
    ] = ENGINES[0],
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes of --engine ray, each with the network in memory; 0: one for each GPU, "
            "or for each 4 CPUs if there is no GPU.",
            rich_help_panel="Machine",
        ),
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Predict the class of every pixel, for images of any size.

    Writes OUT/labels/NAME.png (a palette PNG with the class ids, at the image's size) and
    OUT/overlays/NAME.jpg. With --save regions, OUT/regions.json has the regions of all images as a
    COCO data set, and overlays show them. An image that cannot be read is reported and skipped; the
    exit code is then 3. Warns about images that differ from the training images, and about
    predictions of a single class. IMAGES and OUT may also be URLs that fsspec supports, such as
    s3://bucket/folder.

    With rasterio, georeferenced and huge images are predicted window by window: label map and
    confidence are tiled GeoTIFF files, and the overlay is reduced to at most 4096 pixels.
    """
    config = PredictConfig(
        window,
        overlap,
        flip,
        parse_numbers(scales, "--scales"),
        min_confidence,
        min_region_score,
    )
    chosen_bands = parse_integers(bands, "--bands")
    kinds = [kind.strip() for kind in save.split(",") if kind.strip()]
    if overwrite and skip_existing:
        raise ConfigError(
            "--overwrite and --skip-existing cannot be combined. Use one or the other."
        )
    _check_engine(engine, workers)
    destination = to_path(out)
    check_out_folder(destination, overwrite=overwrite or skip_existing, accept_marked=bool(part))
    from dcnseg.inference.batch import predict_files
    from dcnseg.inference.inputs import find_inputs
    from dcnseg.inference.parts import Part
    from dcnseg.inference.predictor import Predictor
    from dcnseg.inference.result_warnings import find_warnings
    from dcnseg.inference.writers import OUTPUT_FOLDERS, check_output_kinds
    from dcnseg_cli.progress_bar import progress_bar

    check_output_kinds(kinds)
    own_part = Part.parse(part) if part else None
    outputs = [destination / folder for folder in OUTPUT_FOLDERS.values()]
    inputs = find_inputs(images, sys.stdin, outputs=outputs, accept_urls=True, on_note=message)
    if engine == "ray":
        from dcnseg.inference.ray_engine import import_ray, predict_with_ray

        import_ray()  # fail early
        predictor = Predictor.from_checkpoint(run, device="cpu", config=config)
    else:
        predictor = Predictor.load(run, device=device, amp=amp, config=config)
    num_images = len(own_part.select(inputs) if own_part else inputs)
    done = 0
    with progress_bar("Predicting") as on_progress:

        def on_result(result: FileResult) -> None:
            nonlocal done
            done += 1
            on_progress(done, num_images)
            _report(result, as_json=json)

        def on_window(num_done: int, num_windows: int) -> None:
            on_progress(done + num_done / num_windows, num_images)

        settings: dict[str, Any] = {
            "images": inputs,
            "out": destination,
            "kinds": kinds,
            "opacity": opacity,
            "skip_existing": skip_existing,
            "refuse_existing": own_part is not None and not (overwrite or skip_existing),
            "part": own_part,
            "bands": chosen_bands,
            "on_result": on_result,
        }
        if engine == "ray":
            results = predict_with_ray(
                predictor, run, device=device, amp=amp, num_workers=workers, **settings
            )
        else:
            results = predict_files(predictor, on_window=on_window, **settings)
    failed = sum(result.error is not None for result in results)
    skipped = sum(result.is_skipped for result in results)
    for warning in find_warnings(results, predictor.training_data, predictor.class_map.num_classes):
        message(f"Warning: {warning}")
    rest = f"; {skipped} skipped because their outputs exist" if skipped else ""
    num_predicted = len(results) - failed - skipped
    message(f"Predicted {num_predicted} of {len(results)} images in {destination}{rest}.")
    if failed:
        raise typer.Exit(DATA)


def _check_engine(engine: str, workers: int) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"--engine is {engine!r}; expected one of {', '.join(ENGINES)}.")
    if workers and engine != "ray":
        raise ConfigError("--workers needs --engine ray. Remove it, or add --engine ray.")


def _report(result: FileResult, *, as_json: bool) -> None:
    if result.error is not None:
        hint = f" (set {DEBUG_VARIABLE}=1 for the traceback)" if result.is_unexpected else ""
        message(f"Error: {result.error}{hint}")
        if result.is_unexpected and os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            message("".join(traceback.format_exception(result.cause)))
    if as_json:
        print_json(
            {
                "image": str(result.image),
                "outputs": {kind: str(path) for kind, path in result.outputs.items()},
                "class_shares": result.class_shares,
                "share_below_min_confidence": result.share_below,
                "unlike_training": list(result.unlike_training),
                "is_skipped": result.is_skipped,
                "error": result.error,
            }
        )
    elif result.is_predicted:
        echo(str(next(iter(result.outputs.values()))))
