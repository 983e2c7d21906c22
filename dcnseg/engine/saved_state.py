"""Saving and restoring the state of a training run; entry points `save_state`, `restore_state`.

Saved values are checked before they are loaded: torch's `load_state_dict` accepts values of wrong
types, which would fail later, during training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dcnseg.checkpoint import save_resume_state
from dcnseg.config import MAX_COUNT, Preprocessing, from_dict
from dcnseg.engine.environment import ENVIRONMENT
from dcnseg.engine.listener import PartialEpoch
from dcnseg.engine.state import TrainingState, random_states, restore_random_states
from dcnseg.errors import CheckpointError, short_repr
from dcnseg.safe_load import check_finite, summarize_error
from dcnseg.validation import require

MAX_NUMBER: Final = 2**53  # larger integers are not exact as floating-point numbers
_NUMPY_STATE_WORDS: Final = 624


def save_state(path: Path, state: TrainingState) -> None:
    """Write a checkpoint for `restore_state`; the file is replaced atomically."""
    save_resume_state(
        path,
        {
            "model": state.model.state_dict(),
            "average": None if state.average is None else state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "schedule": state.schedule.state_dict(),
            "scaler": state.scaler.state_dict(),
            "preprocessing": asdict(state.preprocessing),
            "epoch": state.epoch,
            "best_epoch": state.best_epoch,
            "best_scores": state.best_scores,
            "so_far": None if state.partial is None else asdict(state.partial),
            "random": random_states(),
            "skipped_in_a_row": state.skipped_in_a_row,
            "settings": state.settings,
            ENVIRONMENT: dict(state.environment),
            "metrics": state.metrics,
        }
        | ({"other_random": list(state.other_random)} if state.other_random else {}),
    )


def restore_state(state: TrainingState, saved: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint into a newly built state.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another network.
    """
    try:
        _restore(state, saved)
    # torch raises many types of exceptions for invalid states.
    except Exception as error:
        raise CheckpointError(
            f"{path} does not fit the run's settings: {summarize_error(error)}"
        ) from error


def _restore(state: TrainingState, saved: Mapping[str, Any]) -> None:
    for name in ("model", "optimizer", "schedule", "scaler", "preprocessing", "best_scores"):
        require(name in saved, f"{name} is missing")
    _load_tensors(state.model, saved["model"], "model")
    if state.average is not None:
        _load_tensors(state.average, saved.get("average"), "average")
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.optimizer.load_state_dict(
        merge_optimizer_state(
            saved["optimizer"], state.optimizer.state_dict(), [p.shape for p in parameters]
        )
    )
    check_finite(dict(state.model.named_parameters()), "its model")
    for values in state.optimizer.state.values():
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        check_finite(tensors, "its optimizer")
    state.schedule.load_state_dict(
        merge_schedule_state(saved["schedule"], state.schedule.state_dict())
    )
    if saved["scaler"]:  # empty if the run did not use float16
        require_like(saved["scaler"], state.scaler.state_dict(), "scaler")
        state.scaler.load_state_dict(saved["scaler"])
    state.preprocessing = from_dict(Preprocessing, saved["preprocessing"])
    state.epoch = saved["epoch"]
    state.best_epoch = saved.get("best_epoch", 0)
    state.best_scores = saved["best_scores"]
    # Early versions saved only complete epochs, without the following keys.
    partial = saved.get("so_far")
    state.partial = None if partial is None else _parse_partial(partial)
    state.random = saved.get("random")
    if state.random is not None:
        check_random_states(state.random)
        restore_random_states(state.random)  # raises here if the states are invalid
    state.other_random = saved.get("other_random", ())
    for states in state.other_random:
        check_random_states(states)
    state.skipped_in_a_row = saved.get("skipped_in_a_row", 0)


def _load_tensors(module: nn.Module, saved: Any, name: str) -> None:
    require_like(saved, module.state_dict(), name)
    module.load_state_dict(saved)


def _parse_partial(saved: Any) -> PartialEpoch:
    partial = from_dict(PartialEpoch, saved)
    for name, value in asdict(partial).items():
        most = math.inf if name == "loss_sum" else MAX_COUNT
        require(0 <= value <= most, f"so_far.{name} is {short_repr(value)}; expected 0 to {most}.")
    return partial


def require_like(saved: Any, own: Any, name: str) -> None:
    """Raise a ConfigError unless `saved` has the types, lengths, shapes and keys of `own`.

    None in `own` also allows a number, and additional keys in `saved` are ignored.
    """
    if isinstance(own, Tensor):
        is_like = isinstance(saved, Tensor) and saved.shape == own.shape
        require(
            is_like and saved.dtype == own.dtype,
            f"{name} is {_kind(saved)}; expected {_kind(own)}.",
        )
    elif isinstance(own, Mapping):
        require(isinstance(saved, Mapping), f"{name} is {_kind(saved)}; expected a dictionary.")
        for key, value in own.items():
            require(key in saved, f"{name} lacks {key}.")
            require_like(saved[key], value, f"{name}.{key}")
    elif isinstance(own, list | tuple):
        require(
            isinstance(saved, list | tuple) and len(saved) == len(own),
            f"{name} is {_kind(saved)}; expected {_kind(own)}.",
        )
        for index, (item, own_item) in enumerate(zip(saved, own, strict=True)):
            require_like(item, own_item, f"{name}[{index}]")
    else:
        require(
            _is_like_value(saved, own),
            f"{name} is {short_repr(saved)}; expected a value such as {short_repr(own)}.",
        )


def merge_optimizer_state(
    saved: Any, own: Mapping[str, Any], shapes: list[torch.Size]
) -> dict[str, Any]:
    """Merge the settings of the new optimizer with the values of the saved one."""
    groups = [{"params": group["params"], "lr": group["lr"]} for group in own["param_groups"]]
    require_like(saved, {"state": {}, "param_groups": groups}, "optimizer")
    for group, own_group in zip(saved["param_groups"], groups, strict=True):
        require(group["params"] == own_group["params"], "the optimizer has different parameters")
        require(
            group["lr"] >= 0, f"the learning rate is {short_repr(group['lr'])}; expected at least 0"
        )
    is_adam = "betas" in own["param_groups"][0]
    number = torch.empty((), device="meta")
    for index, values in saved["state"].items():
        require(
            type(index) is int and index < len(shapes),
            f"optimizer.state has {short_repr(index)}; expected one of {len(shapes)} parameters",
        )
        average = torch.empty(shapes[index], device="meta")
        own_values = {"momentum_buffer": average}
        if is_adam:
            own_values = {"step": number, "exp_avg": average, "exp_avg_sq": average}
        require_like(values, own_values, f"optimizer.state.{index}")
        require(set(values) == set(own_values), f"optimizer.state.{index} has unknown values")
        require(not is_adam or 0 <= values["step"] < math.inf, "optimizer: the step is negative")
    merged = zip(own["param_groups"], saved["param_groups"], strict=True)
    return {
        "state": saved["state"],
        "param_groups": [{**group, "lr": float(other["lr"])} for group, other in merged],
    }


def merge_schedule_state(saved: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the settings of the new schedule with the progress of the saved one.

    Other saved values are dropped: `load_state_dict` would set them as attributes.
    """
    progress = {key: own[key] for key in ("last_epoch", "_step_count", "_last_lr")}
    require_like(saved, progress, "schedule")
    require(saved["last_epoch"] >= 0, "schedule.last_epoch is negative")
    return {**own, **{key: saved[key] for key in progress}}


def check_random_states(saved: Any) -> None:
    """Raise a ConfigError unless `saved` has the structure of `random_states()`."""
    own = random_states() | _expected_cuda(saved)
    version, words, _ = own["python"]
    own["python"] = (version, words, None)  # the third value is sometimes a number
    require_like(saved, own, "random")
    name, _keys, position, *_ = saved["numpy"]
    # NumPy does not check the position.
    require(
        name == "MT19937" and 0 <= position <= _NUMPY_STATE_WORDS,
        f"random.numpy has {short_repr(name)} at {position}; expected MT19937 at 0 to "
        f"{_NUMPY_STATE_WORDS}.",
    )


def _expected_cuda(saved: Any) -> dict[str, Any]:
    """Expect as many GPU states as the file has; it may come from another machine."""
    states = saved.get("cuda") if isinstance(saved, Mapping) else None
    count = len(states) if isinstance(states, list) else 0
    sizes = [state.shape if isinstance(state, Tensor) else () for state in (states or [])[:count]]
    return {"cuda": [torch.empty(size, dtype=torch.uint8) for size in sizes]}


def _is_like_value(saved: Any, own: Any) -> bool:
    if isinstance(saved, str):
        return isinstance(own, str)
    if saved is None or isinstance(saved, bool):
        return own is None or type(own) is type(saved)
    if not isinstance(saved, int | float) or isinstance(own, bool | str):
        return False
    if isinstance(saved, float):
        return math.isfinite(saved) and not isinstance(own, int)
    return abs(saved) <= MAX_NUMBER


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return short_repr(value)
