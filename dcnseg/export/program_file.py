"""Programs of torch.export: `write_program` and `ProgramRunner`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import torch
from torch.export import ExportedProgram

METADATA_FILE: Final = "dcnseg.json"


def write_program(
    program: ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: str
) -> None:
    """Write a program as a .pt2 file, with the metadata as the extra file `dcnseg.json`.

    A program whose deformable layers call torchvision's operator is loaded with
    `torch.export.load` after `import torchvision`, without dcnseg.
    """
    torch.export.save(program, path, extra_files={METADATA_FILE: metadata})


class ProgramRunner:
    """Runs a .pt2 file on the CPU."""

    def __init__(self, path: Path, outputs: tuple[str, ...]) -> None:
        self._module = torch.export.load(path).module()
        self._outputs = outputs

    @torch.no_grad()
    def __call__(self, image: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Compute the outputs by their names."""
        results = self._module(torch.from_numpy(image))
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}
