"""Starting a training from trained weights, decoder included; entry: `read_initial_weights`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dcnseg.checkpoint import WeightsInfo, find_weights, load_segmenter
from dcnseg.config import ModelConfig, Preprocessing, TrainConfig
from dcnseg.data.class_map import ClassMap
from dcnseg.engine.listener import TrainingListener
from dcnseg.errors import ConfigError
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import OFFSET_BRANCH

HEAD = "segmentation_head."
MUST_AGREE = ("architecture", "encoder", "decoder_channels")  # they decide the tensors' shapes
MAY_DIFFER = (
    "output_stride",
    "atrous_rates",
    "late_dilation",
)  # only the size of maps, or what is seen
SHOWN = 8  # names in a line


@dataclass(frozen=True)
class InitialWeights:
    """The tensors of a trained network, and what the new one takes from them.

    Attributes:
        info: What their file says about them.
        tensors: By name.
        head_rows: Index of a class of the new network, and of the class of the same name here.
    """

    info: WeightsInfo
    tensors: Mapping[str, Tensor]
    head_rows: Mapping[int, int] = field(default_factory=dict)

    def for_classes(self, class_map: ClassMap) -> InitialWeights:
        """The same weights for a network of these classes, matched by name."""
        before = {name: index for index, name in enumerate(self.info.class_map.names)}
        rows = {i: before[name] for i, name in enumerate(class_map.names) if name in before}
        return replace(self, head_rows=rows)

    def load_into(self, model: Segmenter) -> Preprocessing:
        """Load what fits; offset branches and head rows without a counterpart stay as they are."""
        own = model.state_dict()
        with torch.no_grad():
            for name in self._fitting(own):
                own[name].copy_(self.tensors[name])
            for name in own:
                if name.startswith(HEAD):
                    for index, before in self.head_rows.items():
                        own[name][index] = self.tensors[name][before]
        return self.info.preprocessing

    def report(self, model: Segmenter, config: TrainConfig, listener: TrainingListener) -> None:
        """Say exactly what is loaded and what is not."""
        own = model.state_dict()
        fitting = self._fitting(own)
        encoder = sum(name.startswith("encoder.") for name in fitting)
        listener.noted(
            f"Starting from {self.info.path}: {encoder} tensors of the encoder and "
            f"{len(fitting) - encoder} of the decoder are loaded."
        )
        listener.noted(self._describe_head(len(own[f"{HEAD}0.bias"])))
        listener.noted(self._describe_offsets(own))
        for name in MAY_DIFFER:
            before, now = getattr(self.info.model, name), getattr(config.model, name)
            if before != now:
                listener.warned(
                    f"{_option(name, now)} differs from that of the weights, {_text(before)}."
                )
        scale = self.info.preprocessing.input_scale
        if scale != config.data.input_scale:
            listener.warned(
                f"--input-scale is {config.data.input_scale:g}, and the weights were trained with "
                f"{scale:g}: to them everything has another size now."
            )

    def _fitting(self, own: Mapping[str, Tensor]) -> list[str]:
        return [
            name
            for name, value in own.items()
            if not name.startswith(HEAD)
            and name in self.tensors
            and self.tensors[name].shape == value.shape
        ]

    def _describe_head(self, num_classes: int) -> str:
        names = self.info.class_map.names
        kept = [names[before] for before in self.head_rows.values()]
        unused = [name for name in names if name not in kept]
        new = num_classes - len(kept)
        if not new and not unused:
            return "Head: loaded, the classes are the same."
        return _sentence(
            "Head",
            kept and f"loaded for the classes of the same name ({_listed(kept)})",
            new and f"initialized anew for {new} of {num_classes} classes",
            unused and f"not used: {_listed(unused)}",
        )

    def _describe_offsets(self, own: Mapping[str, Tensor]) -> str:
        layers, given = _offset_layers(own), _offset_layers(self.tensors)
        loaded = _offset_layers(self._fitting(own))
        new = [name for name in layers if name not in loaded]
        left_out = [name for name in given if name not in layers]
        if not layers and not given:
            return "Offsets: none, all layers are plain."
        return _sentence(
            "Offsets",
            loaded and f"loaded for {len(loaded)} deformable layers",
            new and f"zero at first in {_listed(new)}",
            left_out and f"left out where layers are plain now ({_listed(left_out)})",
        )


def read_initial_weights(source: Path, model: ModelConfig) -> InitialWeights:
    """Read a run folder's best weights, or a weights file, for a network of these settings.

    Raises:
        CheckpointError: there are no weights, or they are damaged.
        ConfigError: they are of another network; the message gives the options that fit.
    """
    trained, info = load_segmenter(find_weights(source))
    different = [name for name in MUST_AGREE if getattr(info.model, name) != getattr(model, name)]
    if different:
        needed = " ".join(_option(name, getattr(info.model, name)) for name in different)
        found = " ".join(_option(name, getattr(model, name)) for name in different)
        raise ConfigError(
            f"--init {source} holds weights of another network, with {needed}; the settings have "
            f"{found}. Add {needed}, or give other weights."
        )
    return InitialWeights(info, trained.state_dict())


def _offset_layers(names: Iterable[str]) -> list[str]:
    found = (name.partition(OFFSET_BRANCH)[0] for name in names if OFFSET_BRANCH in name)
    return list(dict.fromkeys(found))


def _option(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {_text(value)}"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sentence(subject: str, *parts: str | int | list[str]) -> str:
    return f"{subject}: {'; '.join(str(part) for part in parts if part)}."


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
