"""Pretrained encoder weights from a local file or the Hugging Face Hub.

Entry points: `load_encoder_weights`, and `require_encoder_weights` to fail early.
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

HUB_TIMEOUT_SECONDS = 3.0
NO_WEIGHTS = "none"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # common keys of a nested state dict


def require_encoder_weights(name: str, weights: str) -> None:
    """Check within seconds that weights are available; raises as `load_encoder_weights`."""
    if weights == NO_WEIGHTS or Path(weights).is_file():
        return
    if Path(weights).is_dir():
        raise ConfigError(
            f"--encoder-weights is {weights}, a folder; expected a file. To start from all weights "
            f"of a run, use --init {weights}; to load its encoder only, pass its weights file."
        )
    if Path(weights).exists():
        raise ConfigError(f"--encoder-weights is {weights}, which is not a regular file.")
    if Path(weights).suffix or "/" in weights:
        raise ConfigError(f"--encoder-weights is {weights}, which does not exist.")
    entry = smp.encoders.encoders.get(name)
    settings = entry["pretrained_settings"] if entry else {}
    if weights not in settings:
        choices = ", ".join([NO_WEIGHTS, *sorted(settings)])
        raise ConfigError(
            f"--encoder-weights is {weights!r}; expected a local file or, for {name}, "
            f"one of {choices}.{did_you_mean(weights, settings)}"
        )
    repository, revision = settings[weights]["repo_id"], settings[weights]["revision"]
    cached = try_to_load_from_cache(repository, "model.safetensors", revision=revision)
    if not isinstance(cached, str):
        _require_hub(hf_hub_url(repository, "model.safetensors", revision=revision), name, weights)


def load_encoder_weights(encoder: nn.Module, name: str, weights: str) -> Preprocessing:
    """Load pretrained weights into an encoder, deformable or not.

    Args:
        encoder: An encoder from `build_encoder(name)`.
        name: smp's name of the encoder.
        weights: "none", smp's name of pretrained weights ("imagenet"), or a local .safetensors,
            .pth or .pt file with the state dict of an encoder (such as torchvision's ResNet files).

    Returns:
        The normalization that the weights expect.

    Raises:
        ConfigError: The weights do not exist.
        CheckpointError: The file cannot be read or does not fit the encoder; or the weights are
            not cached and the hub does not respond within a few seconds.
    """
    require_encoder_weights(name, weights)
    if weights == NO_WEIGHTS:
        return Preprocessing()
    if Path(weights).is_file():
        _load_state_dict(encoder, _read_state_dict(Path(weights)), weights, name)
        return Preprocessing()
    try:
        pretrained = smp.encoders.get_encoder(name, weights=weights)
        params = smp.encoders.get_preprocessing_params(name, pretrained=weights)
    except Exception as error:  # of the hub's client or the network
        raise _make_hub_error(name, weights, error) from error
    _load_state_dict(encoder, pretrained.state_dict(), weights, name)
    return Preprocessing(mean=tuple(params["mean"]), std=tuple(params["std"]))


def _require_hub(url: str, name: str, weights: str) -> None:
    """Raise a CheckpointError if the hub does not respond; its own client retries for 20 s."""
    failures: list[Exception] = [TimeoutError("no response")]

    def send_request() -> None:
        try:
            response = get_session().head(url, timeout=HUB_TIMEOUT_SECONDS)
            if response.status_code >= 400:
                raise ConnectionError(f"status {response.status_code}")
        except Exception as error:  # reported below
            failures[0] = error
        else:
            failures.clear()

    # In a thread, because DNS lookups have no timeout.
    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS + 1)
    if failures:
        raise _make_hub_error(name, weights, failures[0])


def _make_hub_error(name: str, weights: str, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(
        f"The pretrained weights {weights!r} of {name} are not cached, and the Hugging Face Hub "
        f"cannot be reached ({type(error).__name__}: {reason}). Use --encoder-weights none, or "
        "--encoder-weights PATH with a local file."
    )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    state = load_tensors(path)
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        is_dict = isinstance(state, dict)
        keys = f"dictionary with {short_repr(list(state))}" if is_dict else type(state).__name__
        raise CheckpointError(
            f"{path} has no state dict; expected a dictionary of tensors, possibly under one "
            f"of the keys {', '.join(WRAPPERS)}; found a {keys}. "
            "Save only the state dict: torch.save(model.state_dict(), path)."
        )
    return {str(key): value for key, value in state.items()}


def _strip_prefix(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Select the tensors under a prefix such as "encoder." or "module.backbone.", and remove it."""
    prefixes = [key.removesuffix(names[0]) for key in state if key.endswith(names[0])]
    fitting = [prefix for prefix in prefixes if f"{prefix}{names[-1]}" in state]
    prefix = min(fitting, key=len, default="")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_state_dict(encoder: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    own = encoder.state_dict()
    # Optional: offset branches start at zero, and batch counters do not change the output.
    needed = [k for k in own if OFFSET_BRANCH not in k and not k.endswith("num_batches_tracked")]
    state = _strip_prefix(state, needed)
    missing = [k for k in needed if k not in state]
    reshaped = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or reshaped:
        shapes = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in reshaped]
        raise CheckpointError(
            f"{source} does not fit the encoder {name}: of {len(needed)} tensors, {len(missing)} "
            f"are missing{_format_example(missing)} and {len(reshaped)} have a wrong shape"
            f"{_format_example(shapes)}; the file has {len(state)} tensors. "
            f"Use weights of {name}, or --encoder-weights none."
        )
    fitting = {k: v for k, v in state.items() if k in own}
    check_finite(fitting, source)
    encoder.load_state_dict(fitting, strict=False)


def _format_example(items: Sequence[str]) -> str:
    return f" (for example {items[0]})" if items else ""
