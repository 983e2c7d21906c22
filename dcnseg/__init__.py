"""Semantic segmentation with deformable convolutions.

The names of the public API are loaded when they are first used, so that importing dcnseg takes
milliseconds and no PyTorch. The operators are in `dcnseg.ops`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcnseg.api import compare, evaluate, export_model, resume, train
    from dcnseg.config import DataConfig, ModelConfig, PredictConfig, TrainConfig
    from dcnseg.data.class_map import ClassInfo, ClassMap
    from dcnseg.data.image_io import read_image
    from dcnseg.engine.trainer import TrainResult
    from dcnseg.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DcnsegError,
        ExportError,
        ShapeError,
    )
    from dcnseg.export.operators import onnx_translations
    from dcnseg.inference.prediction import Prediction
    from dcnseg.inference.predictor import Predictor
    from dcnseg.scoring.scores import Scores

__version__ = "0.1.0"

_MODULES = {
    "dcnseg.api": ("compare", "evaluate", "export_model", "resume", "train"),
    "dcnseg.config": ("DataConfig", "ModelConfig", "PredictConfig", "TrainConfig"),
    "dcnseg.data.class_map": ("ClassInfo", "ClassMap"),
    "dcnseg.data.image_io": ("read_image",),
    "dcnseg.engine.trainer": ("TrainResult",),
    "dcnseg.errors": (
        *("CheckpointError", "ConfigError", "DataError", "DcnsegError"),
        *("ExportError", "ShapeError"),
    ),
    "dcnseg.export.operators": ("onnx_translations",),
    "dcnseg.inference.prediction": ("Prediction",),
    "dcnseg.inference.predictor": ("Predictor",),
    "dcnseg.scoring.scores": ("Scores",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ClassInfo",
    "ClassMap",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DcnsegError",
    "ExportError",
    "ModelConfig",
    "PredictConfig",
    "Prediction",
    "Predictor",
    "Scores",
    "ShapeError",
    "TrainConfig",
    "TrainResult",
    "compare",
    "evaluate",
    "export_model",
    "onnx_translations",
    "read_image",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dcnseg' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
