from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from dcnseg.config import TrainConfig
from dcnseg.engine import loggers
from dcnseg.engine.loggers import open_loggers, require_loggers
from dcnseg.engine.run_folder import CONFIG
from dcnseg.errors import ConfigError
from tests.conftest import small_config

RECORD = {"epoch": 2, "loss": 0.5, "class_iou": {"road (wet)": 0.25, "sky": None}, "note": "text"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text('{"started": "2026-01-01T00:00:00+00:00"}')
    return tmp_path


def config(**changes: Any) -> TrainConfig:
    return small_config(Path("data"), **changes)


def test_without_a_logger_nothing_is_written(run: Path) -> None:
    with open_loggers(run, config(), print) as write:
        write(RECORD)
    assert [path.name for path in run.iterdir()] == [CONFIG]


@pytest.mark.parametrize("changes", [{"tensorboard": True}, {"logger": "tensorboard"}])
def test_tensorboard_events(
    monkeypatch: pytest.MonkeyPatch, run: Path, changes: dict[str, Any]
) -> None:
    """With a stand-in for the package, which the tests do not install."""
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(loggers, "find_spec", lambda _: object())
    with open_loggers(run, config(**changes), print) as write:
        write(RECORD)
    module.SummaryWriter.assert_called_once_with(run)
    writer = module.SummaryWriter.return_value
    written = [call.args for call in writer.__enter__.return_value.add_scalar.mock_calls]
    assert written == [("epoch", 2, 2), ("loss", 0.5, 2), ("class_iou/road _wet_", 0.25, 2)]
    writer.__exit__.assert_called_once()


def test_a_logger_that_fails_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    module = MagicMock()
    writer = module.SummaryWriter.return_value.__enter__.return_value
    writer.add_scalar.side_effect = OSError("no space left")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(loggers, "find_spec", lambda _: object())
    warnings: list[str] = []
    with open_loggers(run, config(tensorboard=True), warnings.append) as write:
        write(RECORD)
        write(RECORD)
    assert warnings == ["--logger tensorboard failed and gets no more records: no space left"]
    assert writer.add_scalar.call_count == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install 'dcnseg\[{name}\]'$"):
        require_loggers(config(logger=name))


@pytest.fixture
def mlflow(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    module = pytest.importorskip("mlflow", reason="mlflow is not installed")
    module.set_tracking_uri((run / "mlruns").as_uri())
    yield module
    module.set_tracking_uri(None)


@pytest.mark.filterwarnings("ignore")  # of the package itself
def test_mlflow_continues_a_resumed_run(mlflow: Any, run: Path) -> None:
    for epoch in (2, 3):
        with open_loggers(run, config(logger="mlflow"), print) as write:
            write(RECORD | {"epoch": epoch})
    (found,) = mlflow.search_runs(experiment_names=["dcnseg"], output_format="list")
    assert found.data.params["epochs"] == "2"
    assert found.data.metrics["class_iou/road _wet_"] == 0.25
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(2, 0.5), (3, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for epoch in (2, 3):
        with open_loggers(run, config(logger="wandb"), print) as write:
            write(RECORD | {"epoch": epoch})
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]  # the same id
    assert all(list(folder.glob("*.wandb")) for folder in (first, second))
