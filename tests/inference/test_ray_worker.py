from __future__ import annotations

import errno
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from dcnseg.checkpoint import find_weights
from dcnseg.config import PredictConfig
from dcnseg.errors import DataError
from dcnseg.files import is_output_folder
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.output_plan import OutputTask, plan_outputs
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.ray_worker import (
    MAX_ATTEMPTS,
    Journal,
    WorkerSettings,
    load_predictor,
    picklable,
    predict_chunk,
)
from dcnseg.inference.results import FileResult

PLACE = "process 1 on here"


@pytest.fixture
def tasks(images: list[Path], tmp_path: Path) -> Sequence[OutputTask]:
    inputs = find_inputs([*map(str, images), str(tmp_path / "missing.png")])
    return plan_outputs(inputs, tmp_path / "out", ["labels"]).tasks


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        weights_name="any.safetensors",
        device="cpu",
        amp="off",
        config=PredictConfig(),
        opacity=0.5,
        bands=(),
        folders=[tmp_path / "out"],
        num_threads=1,
        num_workers=2,
    )


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The heights of the images that are predicted."""
    heights: list[int] = []
    original = Predictor.predict

    def note(self: Predictor, image: object, **options: bool) -> object:
        heights.append(len(image))  # type: ignore[arg-type]
        return original(self, image, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "predict", note)
    return heights


def test_finished_images_are_not_predicted_again(
    predictor: Predictor,
    tasks: Sequence[OutputTask],
    settings: WorkerSettings,
    predicted: list[int],
    tmp_path: Path,
) -> None:
    journal = Journal()
    journal.begin([task.image_id for task in tasks], PLACE)
    done = FileResult(tasks[1].image, tasks[1].outputs, {"coral": 1.0})
    journal.finish(tasks[1].image_id, done)
    results = predict_chunk(predictor, tasks, journal, settings)
    assert len(predicted) == 2
    assert results[1] is done
    assert [result.error is None for result in results] == [True, True, True, False]
    assert not tasks[1].outputs["labels"].exists()
    assert tasks[2].outputs["labels"].exists()
    assert is_output_folder(tmp_path / "out")
    assert journal.finished_ids() == {task.image_id for task in tasks}
    assert predict_chunk(predictor, tasks, journal, settings) == results
    assert len(predicted) == 2
    assert pickle.loads(pickle.dumps(results[3])).error == results[3].error
    journal.forget(journal.finished_ids())
    assert not journal.finished_ids()
    assert not journal.places()


def test_an_image_that_kills_workers_fails_alone(
    predictor: Predictor,
    tasks: Sequence[OutputTask],
    settings: WorkerSettings,
    predicted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal()
    note = Predictor.predict
    deadly = 0  # the image whose prediction ends the process

    class Killed(BaseException):
        pass

    def kill(self: Predictor, image: object, **options: bool) -> object:
        if len(predicted) == deadly:
            raise Killed
        return note(self, image, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "predict", kill)
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(Killed):
            predict_chunk(predictor, tasks, journal, settings)
        assert not predicted
    deadly = -1
    results = predict_chunk(predictor, tasks, journal, settings)
    assert results[0].error is not None
    assert results[0].error.startswith(f"{tasks[0].image}: 3 workers were killed while they pred")
    assert f"the last one was {journal.places()[1]}." in results[0].error
    assert [result.is_predicted for result in results] == [False, True, True, False]


def test_workers_that_die_while_they_load() -> None:
    journal = Journal()
    assert [journal.begin_loading() for _ in range(3)] == [1, 2, 3]
    journal.end_loading()
    assert journal.begin_loading() == 1


def test_the_network_comes_from_bytes(run: Path, settings: WorkerSettings) -> None:
    weights = find_weights(run).read_bytes()
    assert load_predictor(weights, settings).class_map.num_classes > 1


def test_errors_can_be_sent() -> None:
    full = OSError(errno.ENOSPC, "full")
    full.filename = "a.png"
    assert pickle.loads(pickle.dumps(picklable(full))).filename == "a.png"
    assert str(pickle.loads(pickle.dumps(picklable(DataError("a: b"))))) == "a: b"
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError("odd")
    assert "test_ray_worker.py" in str(pickle.loads(pickle.dumps(picklable(caught.value))))
