"""The module that is exported: preprocessing, network and outputs; entry point `make_program`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dcnseg.config import Preprocessing
from dcnseg.data.class_map import ClassMap
from dcnseg.export.resize import resize_antialiased, scaled_length

_LEAST_SIDE: Final = 17  # network pixels; the least side that is padded to two strides of 16
_CHECKS: Final = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_tensor_metadata.default,
)
_EXAMPLE_HW: Final = (64, 96)  # network pixels


class ExportedNetwork(nn.Module):
    """A network with its preprocessing and the outputs that programs need.

    Args:
        model: Maps normalized images [B, 3, h, w] to logits [B, K, h, w].
        class_map: The K classes.
        preprocessing: Normalization and scale of the images.
        input: "uint8" or "float".
        outputs: Names of the outputs in their order.
    """

    ids: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_map: ClassMap,
        preprocessing: Preprocessing,
        input: str,
        outputs: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.input = input
        self.outputs = tuple(outputs)
        self.input_scale = preprocessing.input_scale if input == "uint8" else 1.0
        self.are_ids_indices = class_map.ids == tuple(range(class_map.num_classes))
        dtype = torch.uint8 if max(class_map.ids) <= 255 else torch.int32
        self.register_buffer("ids", torch.tensor(class_map.ids, dtype=dtype))
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1) * 255
            self.register_buffer(name, values)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs.

        Args:
            image: With the input "uint8", RGB images, uint8 [B, H, W, 3]. With "float", images
                after `Predictor.prepare`, float32 [B, 3, h, w].

        Returns:
            The outputs in their order. labels: class ids, uint8 or, with an id above 255, int32
            [B, H, W]. probabilities: float32 [B, K, H, W]. logits: float32 [B, K, h, w], at network
            resolution.
        """
        x = self._prepare(image) if self.input == "uint8" else image
        logits = self.model(x)
        values = logits
        if self.input_scale != 1:
            values = F.interpolate(
                logits.softmax(dim=1), size=image.shape[1:3], mode="bilinear", align_corners=False
            )
        computed = {"logits": logits}
        if "probabilities" in self.outputs:
            computed["probabilities"] = values.softmax(dim=1) if values is logits else values
        if "labels" in self.outputs:
            computed["labels"] = self._to_ids(values.argmax(dim=1))
        return tuple(computed[name] for name in self.outputs)

    def _prepare(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).contiguous()
        x = (x.float() - self.mean) / self.std
        if self.input_scale == 1:
            return x
        size_hw = [scaled_length(side, self.input_scale) for side in image.shape[1:3]]
        return resize_antialiased(x, size_hw)

    def _to_ids(self, indices: Tensor) -> Tensor:
        return indices.to(self.ids.dtype) if self.are_ids_indices else self.ids[indices]


def make_program(network: ExportedNetwork) -> ExportedProgram:
    """Trace a network as a program for any batch size, height and width."""
    scale = network.input_scale
    height, width = (math.ceil(side / scale) for side in _EXAMPLE_HW)
    least = math.ceil((_LEAST_SIDE + 1) / scale)
    sides = (Dim("height", min=least), Dim("width", min=least))
    if network.input == "uint8":
        example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
        shape = {0: Dim("batch"), 1: sides[0], 2: sides[1]}
    else:
        example = torch.zeros(2, 3, height, width)
        shape = {0: Dim("batch"), 2: sides[0], 3: sides[1]}
    with torch.no_grad():
        program = torch.export.export(
            network.eval(),
            (example,),
            dynamic_shapes={"image": shape},
            # What is assumed about sizes becomes a check in the program instead of an error.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _remove_checks(program)
    return program


def _remove_checks(program: ExportedProgram) -> None:
    """Remove the checks of what the trace assumed.

    It assumed that the memory layout of some maps is that of the example. The values do not depend
    on the layout, and other sizes may have another one.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
