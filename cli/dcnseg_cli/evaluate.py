"""`dcnseg evaluate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcnseg.config import PairSource, PredictConfig
from dcnseg_cli.options import (
    AmpOption,
    DeviceOption,
    FlipOption,
    ImagesPatternOption,
    JsonOption,
    MasksPatternOption,
    MinRegionScoreOption,
    ModelArgument,
    OverlapOption,
    OverwriteOption,
    PairsOption,
    ScalesOption,
    SplitOption,
    WindowOption,
    check_out_folder,
    comma_list,
    parse_numbers,
)
from dcnseg_cli.reporting import message, print_json, report_errors

if TYPE_CHECKING:
    from dcnseg.scoring.scores import Scores

EPILOG = """
Examples:

  dcnseg evaluate runs/photos photos --split test

  dcnseg evaluate runs/photos photos --split test --out evaluation

  dcnseg evaluate runs/photos photos --flip --scales 0.75,1,1.25 --json

  dcnseg evaluate model.onnx photos
"""


@report_errors
def evaluate(
    run: ModelArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data folder, as for train.")],
    split: SplitOption = "val",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the scores of every class and image, charts, and the worst images.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    min_region_score: MinRegionScoreOption = PredictConfig.min_region_score,
    window: WindowOption = PredictConfig.window,
    overlap: OverlapOption = PredictConfig.overlap,
    flip: FlipOption = PredictConfig.flip,
    scales: ScalesOption = comma_list(PredictConfig.scales),
    images: ImagesPatternOption = "",
    masks: MasksPatternOption = "",
    pairs: PairsOption = None,
    device: DeviceOption = "auto",
    amp: AmpOption = "off",
    json: JsonOption = False,
) -> None:
    """Compute mIoU, class IoU and pixel accuracy on a split, at the original resolution."""
    config = PredictConfig(
        window,
        overlap,
        flip,
        parse_numbers(scales, "--scales"),
        min_region_score=min_region_score,
    )
    source = PairSource(images, masks, pairs)
    from dcnseg.engine.distributed import join_world
    from dcnseg.engine.evaluation import check_classes, find_evaluated_samples
    from dcnseg.engine.evaluation import evaluate as evaluate_samples
    from dcnseg.inference.predictor import Predictor
    from dcnseg_cli.progress_bar import progress_bar

    with join_world() as world:
        world.claim_device(device)
        if out is not None:
            world.on_main(partial(check_out_folder, out, overwrite=overwrite))
        samples = world.on_main(lambda: find_evaluated_samples(run, data, split, source))
        predictor = Predictor.load(run, device=device, amp=amp, config=config)
        world.on_main(lambda: check_classes(data, predictor.class_map))
        with progress_bar("Evaluating") as on_progress:
            scores = evaluate_samples(
                predictor,
                samples,
                has_details=out is not None,
                on_progress=on_progress,
                world=world,
            )
    if not world.is_main:
        return
    if out is not None:
        from dcnseg.report.evaluation_report import write_evaluation

        for path in write_evaluation(out, predictor, samples, scores, split):
            message(str(path))
    if json:
        print_json({"split": split, **scores.to_dict()})
    else:
        print_scores(scores, split)


def print_scores(scores: Scores, split: str) -> None:
    """Print the scores as a table on stdout."""
    from dcnseg_cli.console import open_console
    from dcnseg_cli.score_table import score_table

    summary = scores.to_dict()
    title = f"{split}: {summary['labelled_pixels']:,} labeled pixels"
    open_console().print(score_table(summary, title))
