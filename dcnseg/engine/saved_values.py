"""Whether the parts of a resume state are like those of a fresh state of training.

`load_state_dict` of torch's optimizers and schedules takes over what it is given; a wrong type
would show in the middle of training only. Entry points: `require_like`, `like_optimizer`,
`like_schedule`, `require_random_states`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dcnseg.engine.random_states import random_states
from dcnseg.errors import short_repr
from dcnseg.validation import require

MAX_NUMBER: Final = 2**53  # of whole numbers; greater ones are no floating-point numbers
_NUMPY_STATE_WORDS: Final = 624


def require_like(saved: Any, own: Any, name: str) -> None:
    """Raise a ConfigError unless `saved` has the types, lengths, shapes and keys of `own`.

    What is None in `own` may be a number. Of dictionaries the keys of `own` are compared.
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
            f"{name} is {short_repr(saved)}; expected one like {short_repr(own)}.",
        )


def like_optimizer(saved: Any, own: Mapping[str, Any], shapes: list[torch.Size]) -> dict[str, Any]:
    """The state of an optimizer with the settings of `own` and the learning rates of `saved`.

    Args:
        saved: What the file has.
        own: The state of the fresh optimizer.
        shapes: Those of its parameters, in the order of its groups.
    """
    groups = [{"params": group["params"], "lr": group["lr"]} for group in own["param_groups"]]
    require_like(saved, {"state": {}, "param_groups": groups}, "optimizer")
    for group, own_group in zip(saved["param_groups"], groups, strict=True):
        require(group["params"] == own_group["params"], "the optimizer has other parameters")
        require(
            group["lr"] >= 0, f"the learning rate is {short_repr(group['lr'])}; expected at least 0"
        )
    is_adam = "betas" in own["param_groups"][0]
    for index, values in saved["state"].items():
        require(
            type(index) is int and index < len(shapes),
            f"optimizer.state has {short_repr(index)}, which is none of {len(shapes)} parameters",
        )
        own_values = _adam_state(shapes[index]) if is_adam else _sgd_state(shapes[index])
        require_like(values, own_values, f"optimizer.state.{index}")
        require(set(values) == set(own_values), f"optimizer.state.{index} has other values, too")
        require(not is_adam or 0 <= values["step"] < math.inf, "optimizer: the step is below 0")
    merged = zip(own["param_groups"], saved["param_groups"], strict=True)
    return {
        "state": saved["state"],
        "param_groups": [{**group, "lr": float(other["lr"])} for group, other in merged],
    }


def _sgd_state(shape: torch.Size) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.empty(shape, device="meta")}


def _adam_state(shape: torch.Size) -> dict[str, Tensor]:
    average = torch.empty(shape, device="meta")
    return {"step": torch.empty((), device="meta"), "exp_avg": average, "exp_avg_sq": average}


def like_schedule(saved: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a schedule with the settings of `own` and the progress of `saved`.

    It becomes the attributes of the schedule, so that nothing else may be in it.
    """
    progress = {key: own[key] for key in ("last_epoch", "_step_count", "_last_lr")}
    require_like(saved, progress, "schedule")
    require(saved["last_epoch"] >= 0, "schedule.last_epoch is below 0")
    return {**own, **{key: saved[key] for key in progress}}


def require_random_states(saved: Any) -> None:
    """Raise a ConfigError unless these are the states of generators, as `random_states` gives."""
    own = random_states() | _cuda(saved)
    version, words, _ = own["python"]
    own["python"] = (version, words, None)  # the last one is a number at times
    require_like(saved, own, "random")
    name, _keys, position, *_ = saved["numpy"]
    # NumPy reads from wherever the position says.
    require(
        name == "MT19937" and 0 <= position <= _NUMPY_STATE_WORDS,
        f"random.numpy has {short_repr(name)} at {position}; expected MT19937 at 0 to "
        f"{_NUMPY_STATE_WORDS}.",
    )


def _cuda(saved: Any) -> dict[str, Any]:
    """As many states of GPUs as there are in the file; another machine may have had others."""
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
