"""The summary that `dcnseg train` prints at the end; entry point `report_training`."""

from __future__ import annotations

from dcnseg.checkpoint import BEST_WEIGHTS
from dcnseg.engine.run_folder import PREVIEW, REPORT, read_run
from dcnseg.engine.trainer import TrainResult
from dcnseg.report.run_report import next_commands
from dcnseg_cli.console import open_console
from dcnseg_cli.reporting import echo, message
from dcnseg_cli.score_table import describe_score, score_table


def report_training(result: TrainResult) -> None:
    """Print the best scores, the output files and the next commands; the run folder on stdout."""
    record = read_run(result.run)
    message(
        f"Best: epoch {result.best_epoch} of {record.config.epochs}, "
        f"validation mIoU {describe_score(result.scores.get('mean_iou'))}."
    )
    if "class_iou" in result.scores:
        title = f"validation, epoch {result.best_epoch}"
        open_console(stderr=True).print(score_table(result.scores, title))
    for name, what in ((REPORT, "Report"), (PREVIEW, "Preview"), (BEST_WEIGHTS, "Weights")):
        if (result.run / name).is_file():
            message(f"{what}: {result.run / name}")
    message("Next steps:")
    for command in next_commands(result.run, record):
        message(f"  {command}")
    echo(str(result.run))
