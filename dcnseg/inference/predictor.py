"""From a trained network and a picture to its labels; entry: `Predictor.from_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnseg.checkpoint import SeenPictures, find_weights, load_segmenter
from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import scaled_size_hw
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.errors import ShapeError
from dcnseg.inference.sliding_window import predict_bands
from dcnseg.inference.tta import augmented
from dcnseg.models.segmenter import Segmenter


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture.

    Attributes:
        labels: Training index of the most probable class of each pixel, uint8 [H, W].
        probabilities: Probability of each class, float16 [K, H, W]; None unless asked for.
    """

    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float16] | None = None


class Predictor:
    """Applies a network to pictures as they come from a file.

    Attributes:
        model: The network, in evaluation mode on `device`.
        class_map: Names, ids and colours of the K classes.
        preprocessing: Normalisation and scale that the weights were trained with.
        training_data: What the training pictures were like, if that is known.
    """

    def __init__(
        self,
        model: Segmenter,
        class_map: ClassMap,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        amp_dtype: torch.dtype | None = None,
        config: PredictConfig | None = None,
        training_data: SeenPictures | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.class_map = class_map
        self.preprocessing = preprocessing
        self.device = device
        self.amp_dtype = amp_dtype
        self.config = config or PredictConfig()
        self.training_data = training_data
        self._mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1) * 255

    @classmethod
    def from_checkpoint(
        cls,
        run: Path | str,
        *,
        device: str = "auto",
        amp: str = "off",
        config: PredictConfig | None = None,
    ) -> Predictor:
        """Load a run folder's best weights, or a weights file.

        Args:
            run: Run folder or weights file.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            amp: "off", "auto", "bf16" or "fp16".
            config: Windows and test-time augmentation.

        Raises:
            CheckpointError: there are no weights, or they are broken, of a newer version, or do
                not fit what the file says of its classes and network.
            ConfigError: the device is not there.
        """
        model, info = load_segmenter(find_weights(Path(run)))
        chosen = select_device(device)
        return cls(
            model.to(memory_format=torch.channels_last),
            info.class_map,
            info.preprocessing,
            device=chosen,
            amp_dtype=select_amp_dtype(amp, chosen),
            config=config,
            training_data=info.training_data,
        )

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """The network's input for a picture, resized by `input_scale` and normalised.

        Args:
            image: RGB, uint8 [H, W, 3].

        Returns:
            float32 [1, 3, h, w], h = max(1, round(H * input_scale)).

        Raises:
            ShapeError: the picture is not uint8 [H, W, 3] with at least one pixel.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ShapeError(
                f"`image` is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3], RGB."
            )
        x = torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1)
        x = ((x.float() - self._mean) / self._std)[None]
        if self.preprocessing.input_scale != 1:
            size = scaled_size_hw(x.shape[-2:], self.preprocessing.input_scale)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def predict(
        self, image: npt.NDArray[np.uint8], *, with_probabilities: bool = False
    ) -> Prediction:
        """Label every pixel of a picture, whatever its size.

        Args:
            image: RGB, uint8 [H, W, 3].
            with_probabilities: Whether to keep the probabilities, K * H * W * 2 bytes.

        Raises:
            ShapeError: the picture is not uint8 [H, W, 3] with at least one pixel.
        """
        height, width = image.shape[:2]
        predict = augmented(
            self._predict_probabilities, flip=self.config.flip, scales=self.config.scales
        )

        def predict_window(rows: slice, columns: slice) -> Tensor:
            window = image[rows, columns]
            probabilities = predict(self.prepare(window))
            if probabilities.shape[-2:] != window.shape[:2]:
                probabilities = F.interpolate(probabilities, size=window.shape[:2], mode="bilinear")
            return probabilities[0]

        side = max(1, round(self.config.window / self.preprocessing.input_scale))
        labels = np.empty((height, width), np.uint8)
        bands: list[npt.NDArray[np.float16]] = []
        for top, band in predict_bands(
            predict_window, (height, width), (side, side), self.config.overlap
        ):
            labels[top : top + band.shape[1]] = band.argmax(dim=0).to(torch.uint8).cpu().numpy()
            if with_probabilities:
                bands.append(band.half().cpu().numpy())
        return Prediction(labels, np.concatenate(bands, axis=1) if bands else None)

    def _predict_probabilities(self, x: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            logits: Tensor = self.model(x)
        return logits.float().softmax(dim=1)
