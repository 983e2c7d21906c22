"""Pretrained encoder weights, from a local file or the hub that segmentation-models-pytorch uses.

Entry points: `load_encoder_weights`, and `require_encoder_weights` to know early.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
from torch import Tensor, nn

from dcnseg.config import Preprocessing
from dcnseg.errors import CheckpointError, ConfigError, short_repr
from dcnseg.ops.deform_conv.module import OFFSET_BRANCH
from dcnseg.safe_load import check_finite, load_tensors
from dcnseg.validation import did_you_mean

HUB_ANSWER_SECONDS = 3.0
NO_WEIGHTS = "none"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys of a state dict in training scripts


def require_encoder_weights(name: str, weights: str) -> None:
    """Raise what `load_encoder_weights` would raise for want of the weights, within seconds."""
    if weights == NO_WEIGHTS or Path(weights).is_file():
        return
    if Path(weights).is_dir():
        raise ConfigError(
            f"--encoder-weights is {weights}, a folder. To start from the weights of a run, "
            f"decoder included, use --init {weights}; for its encoder alone, give the weights file."
        )
    if Path(weights).exists():
        raise ConfigError(f"--encoder-weights is {weights}, which is not a regular file.")
    if Path(weights).suffix or "/" in weights:
        raise ConfigError(f"--encoder-weights is {weights}, but there is no such file.")
    entry = smp.encoders.encoders.get(name)
    settings = entry["pretrained_settings"] if entry else {}
    if weights not in settings:
        there = ", ".join([NO_WEIGHTS, *sorted(settings)])
        raise ConfigError(
            f"--encoder-weights is {weights!r}; for {name} there are: {there}, or a local file."
            f"{did_you_mean(weights, settings)}"
        )
    repository, revision = settings[weights]["repo_id"], settings[weights]["revision"]
    cached = try_to_load_from_cache(repository, "model.safetensors", revision=revision)
    if not isinstance(cached, str):
        _require_hub(hf_hub_url(repository, "model.safetensors", revision=revision), name, weights)


def load_encoder_weights(encoder: nn.Module, name: str, weights: str) -> Preprocessing:
    """Load `weights` into an encoder, deformable or not, and say how images are normalized.

    Args:
        encoder: The encoder that `build_encoder(name)` made.
        name: smp's name of the encoder.
        weights: "none", a local .safetensors, .pth or .pt file with an encoder's state dict
            (torchvision's ResNet files fit), or smp's name of pretrained weights ("imagenet").

    Raises:
        ConfigError: there are no such weights.
        CheckpointError: the file cannot be read or does not fit the encoder; or the weights are
            not on this machine and the hub does not answer within a few seconds.
    """
    require_encoder_weights(name, weights)
    if weights == NO_WEIGHTS:
        return Preprocessing()
    if Path(weights).is_file():
        _load_into(encoder, _read_state_dict(Path(weights)), weights, name)
        return Preprocessing()
    try:
        pretrained = smp.encoders.get_encoder(name, weights=weights)
        params = smp.encoders.get_preprocessing_params(name, pretrained=weights)
    except Exception as error:  # whatever the hub's client, or its network, comes up with
        raise _unavailable(name, weights, error) from error
    _load_into(encoder, pretrained.state_dict(), weights, name)
    return Preprocessing(mean=tuple(params["mean"]), std=tuple(params["std"]))


def _require_hub(url: str, name: str, weights: str) -> None:
    """Fail within seconds where the hub cannot be reached; its own client retries for 20 s."""
    failures: list[Exception] = [TimeoutError("no answer")]

    def ask() -> None:
        try:
            answer = get_session().head(url, timeout=HUB_ANSWER_SECONDS)
            if answer.status_code >= 400:
                raise ConnectionError(f"status {answer.status_code}")
        except Exception as error:  # any failure of the connection, told below by its text
            failures[0] = error
        else:
            failures.clear()

    # A thread, since the look-up of a host name has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_ANSWER_SECONDS + 1)
    if failures:
        raise _unavailable(name, weights, failures[0])


def _unavailable(name: str, weights: str, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(
        f"The pretrained weights {weights!r} of {name} are not on this machine, and the hub they "
        f"come from cannot be reached ({type(error).__name__}: {reason}). Go on with "
        "--encoder-weights none, or with a local file: --encoder-weights PATH."
    )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    state = load_tensors(path)
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]  # training scripts often wrap the weights so
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        is_dict = isinstance(state, dict)
        keys = f"dictionary with {short_repr(list(state))}" if is_dict else type(state).__name__
        raise CheckpointError(
            f"{path} holds no state dict. Expected a dictionary of names and tensors, or one under "
            f"{', '.join(WRAPPERS)}; found a {keys}. "
            "Save the state dict alone: torch.save(model.state_dict(), path)."
        )
    return {str(key): value for key, value in state.items()}


def _without_prefix(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the part of a network whose names are `names`, under these names.

    Whole networks and wrappers put a prefix before them, such as "encoder." or "module.backbone.".
    """
    prefixes = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])]
    fitting = [prefix for prefix in prefixes if f"{prefix}{names[-1]}" in state]
    prefix = min(fitting, key=len, default="")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_into(encoder: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    own = encoder.state_dict()
    # Offset branches start at zero where a file has none. Counters of batch normalization are not
    # in every file and do not change what is computed.
    needed = [k for k in own if OFFSET_BRANCH not in k and not k.endswith("num_batches_tracked")]
    state = _without_prefix(state, needed)
    missing = [k for k in needed if k not in state]
    reshaped = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or reshaped:
        shapes = [f"{k} {list(state[k].shape)} for {list(own[k].shape)}" for k in reshaped]
        raise CheckpointError(
            f"{source} does not fit the encoder {name}, which needs {len(needed)} tensors: "
            f"{len(missing)} are missing{_example(missing)} and {len(reshaped)} have another shape"
            f"{_example(shapes)}, of {len(state)} in the file. Give a file of {name}, or "
            "--encoder-weights none."
        )
    fitting = {k: v for k, v in state.items() if k in own}
    check_finite(fitting, source)
    encoder.load_state_dict(fitting, strict=False)


def _example(items: Sequence[str]) -> str:
    return f" ({items[0]} for one)" if items else ""
