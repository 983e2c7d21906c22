"""Writes the record of each epoch to TensorBoard, Weights & Biases or MLflow.

Entry points: `open_loggers`, and `require_loggers` to fail early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from dcnseg.config import TrainConfig, flatten_settings
from dcnseg.engine.run_folder import CONFIG
from dcnseg.errors import ConfigError
from dcnseg.files import read_json

PROJECT: Final = "dcnseg"  # project in Weights & Biases, experiment in MLflow
PACKAGES: Final = ("tensorboard", "wandb", "mlflow")

WriteRecord = Callable[[Mapping[str, Any]], None]


def chosen_loggers(config: TrainConfig) -> list[str]:
    """The names of the loggers that the settings ask for."""
    chosen = {config.logger, "tensorboard" if config.tensorboard else ""}
    return [name for name in PACKAGES if name in chosen]


def require_loggers(config: TrainConfig) -> None:
    """Raise a ConfigError if the package of a logger is not installed."""
    for name in chosen_loggers(config):
        if find_spec(name) is None:
            raise ConfigError(f"--logger {name} needs a package: pip install 'dcnseg[{name}]'")


@contextmanager
def open_loggers(
    run: Path, config: TrainConfig, on_warning: Callable[[str], None]
) -> Iterator[WriteRecord]:
    """Yield a function that writes an epoch's record to the chosen loggers.

    A resumed run continues its curves. A logger that fails gets no more records, with a warning.
    Where Weights & Biases and MLflow store them, and whether they use the network, is set with
    their environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: a package is not installed.
    """
    require_loggers(config)
    open_logger = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(open_logger[name](run, config))
            for name in chosen_loggers(config)
        }

        def write(record: Mapping[str, Any]) -> None:
            numbers = dict(_flatten(record))
            for name, writer in list(writers.items()):
                try:
                    writer(numbers, record["epoch"])
                except Exception as error:  # of a network, for example; the run is more important
                    del writers[name]
                    on_warning(f"--logger {name} failed and gets no more records: {error}")

        yield write


@contextmanager
def _tensorboard(
    run: Path, config: TrainConfig
) -> Iterator[Callable[[dict[str, float], int], None]]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run) as writer:

        def write(numbers: dict[str, float], epoch: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, epoch)

        yield write


@contextmanager
def _wandb(run: Path, config: TrainConfig) -> Iterator[Callable[[dict[str, float], int], None]]:
    import wandb

    with wandb.init(
        project=PROJECT,
        name=run.resolve().name,
        id=_identify(run),
        resume="allow",
        dir=run,
        config=flatten_settings(config),
    ) as session:
        yield lambda numbers, epoch: session.log(numbers, step=epoch)


@contextmanager
def _mlflow(run: Path, config: TrainConfig) -> Iterator[Callable[[dict[str, float], int], None]]:
    import mlflow

    mlflow.set_experiment(PROJECT)
    tag = f"{PROJECT}.run"
    before = mlflow.search_runs(
        experiment_names=[PROJECT],
        filter_string=f"tags.`{tag}` = '{_identify(run)}'",
        output_format="list",
    )
    with mlflow.start_run(
        run_id=before[0].info.run_id if before else None,
        run_name=run.resolve().name,
        tags={tag: _identify(run)},
    ):
        if not before:
            mlflow.log_params(flatten_settings(config))

        def write(numbers: dict[str, float], epoch: int) -> None:
            mlflow.log_metrics(numbers, step=epoch)

        yield write


def _identify(run: Path) -> str:
    """An id of the run, the same after a resume, and another one if it is overwritten."""
    started = read_json(run / CONFIG)["started"]
    return sha256(f"{run.resolve()} {started}".encode()).hexdigest()[:16]


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        key = prefix + re.sub(r"[^\w\-. ]", "_", name)  # what MLflow accepts
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}/")
        elif isinstance(value, int | float):
            yield key, value
