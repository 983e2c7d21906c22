"""Initial weights from a trained network; the entry point is `read_initial_weights`."""

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
from dcnseg.models.region_head import CLASS_LAYERS
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import OFFSET_BRANCH

HEAD = "segmentation_head."
REGION_HEAD = "region_head."
MUST_MATCH = ("architecture", "encoder", "decoder_channels")  # they determine tensor shapes
MAY_DIFFER = ("output_stride", "atrous_rates", "late_dilation")  # with a warning
MAX_NAMES = 8  # in a message


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a trained network, to be loaded into a new one."""

    info: WeightsInfo
    tensors: Mapping[str, Tensor]
    head_rows: Mapping[int, int] = field(default_factory=dict)  # new class -> class in the weights
    has_same_classes: bool = False  # in the same order

    def for_classes(self, class_map: ClassMap) -> InitialWeights:
        """Match the classes by name; returns a copy."""
        names = self.info.class_map.names
        before = {name: index for index, name in enumerate(names)}
        rows = {i: before[name] for i, name in enumerate(class_map.names) if name in before}
        return replace(self, head_rows=rows, has_same_classes=class_map.names == names)

    def load_into(self, model: Segmenter) -> Preprocessing:
        """Load all tensors and head rows that fit; the others keep their initial values."""
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
        """Report which weights are loaded, and which settings differ."""
        own = model.state_dict()
        fitting = self._fitting(own)
        encoder, decoder = (
            sum(name.startswith(part) for name in fitting) for part in ("encoder.", "decoder.")
        )
        listener.noted(
            f"Initial weights from {self.info.path}: loaded {encoder} encoder tensors and "
            f"{decoder} decoder tensors."
        )
        listener.noted(self._describe_head(len(own[f"{HEAD}0.bias"])))
        listener.noted(self._describe_offsets(own))
        if text := self._describe_region_head(own):
            listener.noted(text)
        for name in MAY_DIFFER:
            before, now = getattr(self.info.model, name), getattr(config.model, name)
            if before != now:
                listener.warned(
                    f"{_option(name, now)} differs from the {_text(before)} of the initial weights."
                )
        scale = self.info.preprocessing.input_scale
        if scale != config.data.input_scale:
            listener.warned(
                f"--input-scale is {config.data.input_scale:g}, but the initial weights were "
                f"trained with {scale:g}: objects have a different size in the network's input."
            )

    def _fitting(self, own: Mapping[str, Tensor]) -> list[str]:
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        names = [n for n, t in own.items() if not n.startswith(HEAD) and shapes.get(n) == t.shape]
        unfit = set(_region_layers({*own} - {*names}))  # layers are loaded as a whole
        if not self.has_same_classes:  # layers of other classes may fit by chance
            unfit.update(CLASS_LAYERS)
        return [name for name in names if _region_layer(name) not in unfit]

    def _describe_head(self, num_classes: int) -> str:
        names = self.info.class_map.names
        kept = [names[before] for before in self.head_rows.values()]
        unused = [name for name in names if name not in kept]
        new = num_classes - len(kept)
        if not new and not unused:
            return "Head: loaded; the classes are the same."
        return _sentence(
            "Head",
            kept and f"loaded for classes with the same name ({_listed(kept)})",
            new and f"randomly initialized for {new} of {num_classes} classes",
            unused and f"not used: {_listed(unused)}",
        )

    def _describe_offsets(self, own: Mapping[str, Tensor]) -> str:
        layers, given = _offset_layers(own), _offset_layers(self.tensors)
        loaded = _offset_layers(self._fitting(own))
        new = [name for name in layers if name not in loaded]
        unused = [name for name in given if name not in layers]
        if not layers and not given:
            return "Offsets: none; the model has no deformable layers."
        return _sentence(
            "Offsets",
            loaded and f"loaded for {len(loaded)} deformable layers",
            new and f"initialized to zero in {_listed(new)}",
            unused and f"not used in layers that are no longer deformable ({_listed(unused)})",
        )

    def _describe_region_head(self, own: Mapping[str, Tensor]) -> str:
        """Describe the region head; "" if neither network has one."""
        layers, given = _region_layers(own), _region_layers(self.tensors)
        loaded = _region_layers(self._fitting(own))
        new = [name for name in layers if name not in loaded]
        unused = [name for name in given if name not in layers]
        if not layers:
            return "Region head: not used; the model has none." if given else ""
        if not given:
            return "Region head: randomly initialized."
        if not new and not unused:
            return "Region head: loaded."
        return _sentence(
            "Region head",
            loaded and f"loaded in {_listed(loaded)}",
            new and f"newly initialized in {_listed(new)}",
            unused and f"not used: {_listed(unused)}",
        )


def read_initial_weights(source: Path, model: ModelConfig) -> InitialWeights:
    """Read the best weights of a run folder, or a weights file.

    Raises:
        CheckpointError: the weights are missing or damaged.
        ConfigError: they do not fit the network; the message names the options to set.
    """
    trained, info = load_segmenter(find_weights(source))
    different = [name for name in MUST_MATCH if getattr(info.model, name) != getattr(model, name)]
    if different:
        needed = " ".join(_option(name, getattr(info.model, name)) for name in different)
        found = " ".join(_option(name, getattr(model, name)) for name in different)
        raise ConfigError(
            f"--init {source} has weights of a different network: it needs {needed}, but the "
            f"settings are {found}. Add {needed}, or choose other weights."
        )
    return InitialWeights(info, trained.state_dict())


def _offset_layers(names: Iterable[str]) -> list[str]:
    found = (name.partition(OFFSET_BRANCH)[0] for name in names if OFFSET_BRANCH in name)
    return list(dict.fromkeys(found))


def _region_layer(name: str) -> str:
    """Return the layer of the region head that a tensor belongs to; "" for other tensors."""
    return name.removeprefix(REGION_HEAD).rpartition(".")[0] if name.startswith(REGION_HEAD) else ""


def _region_layers(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(_region_layer, names))))


def _option(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {_text(value)}"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sentence(subject: str, *parts: str | int | list[str]) -> str:
    return f"{subject}: {'; '.join(str(part) for part in parts if part)}."


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest
