"""Exported ONNX models as networks of a Predictor; entry point `OnnxNetwork`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from dcnseg.checkpoint import METADATA_KEY, WeightsInfo, parse_header
from dcnseg.config import EXPORT_SUFFIXES
from dcnseg.device import select_device
from dcnseg.errors import CheckpointError, ConfigError
from dcnseg.inference.optional_packages import import_package

IMAGE: Final = "image"  # the input of exported models
LOGITS: Final = "logits"
_CUDA: Final = "CUDAExecutionProvider"
_ERRORS_ONLY: Final = 3  # log severity of ONNX Runtime


def is_onnx_file(path: Path) -> bool:
    """Whether a path names an ONNX model instead of a run or weights file."""
    return path.suffix == EXPORT_SUFFIXES["onnx"]


class OnnxNetwork(nn.Module):
    """A model of `dcnseg export`, run by ONNX Runtime.

    Attributes:
        info: Classes, preprocessing and the other metadata of the weights.
        device: The device that the model runs on.
        has_preprocessing: Whether the model takes images as uint8, which it normalizes itself.

    Raises:
        CheckpointError: The file is missing or damaged, or was not written by dcnseg.
        ConfigError: ONNX Runtime is not installed or does not support the device, or the model has
            no output `logits`.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        super().__init__()
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; expected an exported ONNX model.")
        runtime = import_package("onnxruntime")
        self.device, provider = _select_provider(runtime, device)
        self._session = open_session(runtime, path, provider)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise CheckpointError(
                f"{path} was not written by dcnseg: its metadata has no {METADATA_KEY!r} entry; "
                "expected a model of `dcnseg export`."
            )
        self.info: WeightsInfo = parse_header(path, metadata[METADATA_KEY])
        outputs = [output.name for output in self._session.get_outputs()]
        if LOGITS not in outputs:
            raise ConfigError(
                f"{path} has the output {', '.join(outputs)}, but overlapping windows are blended "
                "from the logits. Export it again with --output labels,logits."
            )
        self.has_preprocessing = "uint8" in self._session.get_inputs()[0].type
        self._options = runtime.RunOptions()
        self._options.only_execute_path_to_fetches = True  # without the labels

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of an image.

        Args:
            x: With preprocessing in the model, RGB, uint8 [1, 3, H, W]; otherwise normalized and at
                network resolution, float32 [1, 3, h, w].

        Returns:
            float32 [1, K, h, w], at network resolution.
        """
        if self.has_preprocessing:
            x = x.permute(0, 2, 3, 1)
        feed = {IMAGE: x.contiguous().numpy(force=True)}
        (logits,) = self._session.run([LOGITS], feed, self._options)
        return torch.from_numpy(logits).to(self.device)

    def deformable_layers(self) -> dict[str, nn.Module]:
        """Return no layers: those of an exported model cannot be inspected."""
        return {}

    def require_region_head(self) -> NoReturn:
        """Raise a ConfigError, because region heads are not exported."""
        raise ConfigError(
            "An exported model has no region head, which scores regions (--save regions, "
            "--min-region-score). Use the run that it was exported from."
        )


def open_session(runtime: Any, path: Path, provider: Any = "CPUExecutionProvider") -> Any:
    """Open an ONNX model with ONNX Runtime; raises a CheckpointError if it is damaged."""
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # the runtime raises a class of its own for each status
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be opened by ONNX Runtime: {reason}") from error


def _select_provider(runtime: Any, device: str) -> tuple[torch.device, Any]:
    """Return the device, and what ONNX Runtime calls it."""
    has_cuda = _CUDA in runtime.get_available_providers()
    chosen = select_device("cpu" if device == "auto" and not has_cuda else device)
    if chosen.type == "cpu":
        return chosen, "CPUExecutionProvider"
    if chosen.type != "cuda" or not has_cuda:
        raise ConfigError(
            f"--device is {device}, but the installed ONNX Runtime does not support it. Use "
            "--device cpu; for NVIDIA GPUs, install onnxruntime-gpu instead of onnxruntime."
        )
    return chosen, (_CUDA, {"device_id": chosen.index or 0})
