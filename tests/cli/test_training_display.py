from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from dcnseg.engine.listener import RunSummary, Step, TrainingListener
from dcnseg_cli.training_display import (
    LiveDisplay,
    PlainDisplay,
    SilentDisplay,
    describe_epoch,
    describe_run,
    describe_seconds,
)

SUMMARY = RunSummary(
    run=Path("run"),
    splits={"train": 10, "val": 2, "test": 0},
    num_classes=3,
    num_parameters=12_300_000,
    deformable_layers=("a", "b", "c"),
    device="cpu",
    number_format="float32",
    first_epoch=3,
    epochs=20,
    steps_per_epoch=2,
)
RECORD = {
    "epoch": 3,
    "loss": 0.5,
    "images_per_second": 8.0,
    "seconds": 4.0,
    "mean_iou": 0.25,
    "offsets": {"a": {"mean_px": 0.5}, "b": {"mean_px": 1.5}},
}


def play(display: TrainingListener) -> None:
    display.checking(6, 12)
    display.checking(12, 12)
    display.started(SUMMARY)
    display.step_done(Step(3, 1, 0.7, 8.0, 100.0))
    display.epoch_done(RECORD, is_best=True)
    display.stopped_early(3, 5)


def test_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    play(PlainDisplay(Console(file=out, width=40)))
    assert out.getvalue().splitlines() == [
        "Checked 12 image/mask pairs.",
        "10 train, 2 val images, 3 classes; 12.3 M parameters, 3 deformable layers; cpu in "
        "float32; epochs 3 to 20",
        "epoch 3/20  loss 0.500  mIoU 0.250 (best)  offsets 1.00 px  8.0 images/s  4 s",
        "Stopped at epoch 3: no improvement for 5 epochs.",
    ]


def test_other_processes_display_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    play(SilentDisplay(None))
    assert capsys.readouterr() == ("", "")
    shared = replace(SUMMARY, batch_size=8, num_processes=2)
    assert "batches of 8 in 2 processes, epochs 3 to 20" in describe_run(shared)


def test_live_display_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with Progress(console=console) as progress:
        play(LiveDisplay(progress))
    assert "epoch 3/20  loss 0.500  mIoU 0.250 (best)" in out.getvalue()
    assert "epoch 3" in out.getvalue()


def test_an_epoch_without_scores() -> None:
    record = {"epoch": 1, "loss": 1.0, "images_per_second": 2.0, "seconds": 9.6}
    text = describe_epoch(record, 2, is_best=False)
    assert text == "epoch 1/2  loss 1.000  2.0 images/s  10 s"


def test_durations() -> None:
    assert [describe_seconds(s) for s in (0, 7.4, 247, 3750)] == ["0:00", "0:07", "4:07", "1:02:30"]


def test_a_best_epoch_whose_offsets_have_run_away_says_so() -> None:
    text = describe_epoch(RECORD | {"runaway_layers": ["a", "b"]}, 20, is_best=True)
    assert (
        "(best)  offsets 1.00 px  (warning: 2 layers sample mostly outside the feature map)" in text
    )
