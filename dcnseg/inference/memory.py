"""Memory that does not suffice for a picture, in words; the entry point is `names_what_to_try`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dcnseg.device import is_out_of_memory
from dcnseg.errors import DataError
from dcnseg.inference.predictor import Predictor

LEAST_WINDOW = 64


@contextmanager
def names_what_to_try(path: Path, size_hw: Sequence[int], predictor: Predictor) -> Iterator[None]:
    """Within it, a lack of memory is an error that names the picture and a smaller window.

    Raises:
        DataError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(size_hw) * predictor.preprocessing.input_scale
        used = int(min(predictor.config.window, longest))
        smaller = max(LEAST_WINDOW, used // 2)
        advice = f"Try --window {smaller}" if smaller < used else "Resize the picture"
        raise DataError(
            f"{path}: the memory of {predictor.device} is not enough for this picture of "
            f"{size_hw[1]}x{size_hw[0]} with --window {predictor.config.window}. {advice}."
        ) from error
