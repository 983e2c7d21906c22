"""The record of each epoch in metrics.jsonl.

Entry points: `append_metrics`, `read_metrics`, `restore_metrics`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.config import MAX_COUNT
from dcnseg.engine.run_folder import METRICS, explain_write_errors
from dcnseg.errors import CheckpointError, ConfigError, short_repr
from dcnseg.files import atomic_path, open_regular_file, parse_json
from dcnseg.safe_load import summarize_error
from dcnseg.validation import require_json_value


def append_metrics(run: Path, record: Mapping[str, Any]) -> None:
    """Append an epoch to metrics.jsonl and flush the file to disk."""
    path = run / METRICS
    with explain_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(metrics_line(record))
        file.flush()
        os.fsync(file.fileno())


def metrics_line(record: Mapping[str, Any]) -> str:
    """Format an epoch as a line of metrics.jsonl."""
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the epochs of metrics.jsonl in order; an incomplete last line is ignored.

    Raises:
        CheckpointError: the file is damaged; the message names the line.
    """
    path = run / METRICS
    if not path.is_file():
        return []
    try:
        with open_regular_file(path) as file:
            complete, _, _ = file.read().decode().rpartition("\n")
        lines = enumerate(complete.split("\n"), 1)
        return [_parse_line(line, number) for number, line in lines if complete]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error


def _parse_line(line: str, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
        require_json_value(record, "it")
    except (ValueError, ConfigError) as error:
        raise ValueError(f"line {number}: {error}") from error
    epoch = record.get("epoch") if isinstance(record, dict) else None
    if type(epoch) is not int or not 1 <= epoch <= MAX_COUNT:
        raise ValueError(f"line {number} is {short_repr(record)}; expected an object with an epoch")
    return dict(record)


def restore_metrics(
    run: Path, epoch: int, saved: str | None, on_warning: Callable[[str], None]
) -> str:
    """Rewrite metrics.jsonl with the epochs up to `epoch`; later ones will be computed again.

    `saved` is the file's text in the checkpoint. Without it, as in checkpoints of early versions,
    only the epochs that are still in the file are kept, with a warning about others.

    Raises:
        CheckpointError: the saved text is damaged, or the file cannot be written.
    """
    if saved is not None and not (isinstance(saved, str) and saved.isascii()):  # as json.dumps
        raise CheckpointError(f"{run / RESUME_STATE}: its copy of {METRICS} is damaged.")
    text = saved
    if text is None:
        kept = [record for record in read_metrics(run) if record["epoch"] <= epoch]
        text = "".join(metrics_line(record) for record in kept)
        if missing := sorted(set(range(1, epoch + 1)) - {record["epoch"] for record in kept}):
            on_warning(
                f"{run / METRICS} and the checkpoint lack {len(missing)} of the epochs up to "
                f"{epoch}, such as epoch {missing[0]}. Training continues without their scores."
            )
    with explain_write_errors(run / METRICS), atomic_path(run / METRICS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
