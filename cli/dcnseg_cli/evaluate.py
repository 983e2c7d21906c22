"""`dcnseg evaluate`."""

from __future__ import annotations

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
    OverlapOption,
    PairsOption,
    RunArgument,
    ScalesOption,
    SplitOption,
    WindowOption,
    comma_list,
    parse_numbers,
)
from dcnseg_cli.reporting import print_json, report_errors

if TYPE_CHECKING:
    from dcnseg.engine.evaluation import Scores

EPILOG = """
Examples:

  dcnseg evaluate runs/photos photos --split test

  dcnseg evaluate runs/photos photos --flip --scales 0.75,1,1.25 --json
"""


@report_errors
def evaluate(
    run: RunArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data folder, as for train.")],
    split: SplitOption = "val",
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
    config = PredictConfig(window, overlap, flip, parse_numbers(scales, "--scales"))
    source = PairSource(images, masks, pairs)
    from dcnseg.engine.evaluation import evaluate_run
    from dcnseg_cli.progress_bar import progress_bar

    with progress_bar("Evaluating") as on_progress:
        scores = evaluate_run(
            run,
            data,
            split,
            device=device,
            amp=amp,
            config=config,
            source=source,
            on_progress=on_progress,
        )
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
