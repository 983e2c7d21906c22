"""Prediction of single images; entry points `Predictor.from_checkpoint` and `Predictor.load`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnseg.checkpoint import TrainingDataStats, find_weights, load_segmenter
from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.data.dataset import scaled_size_hw
from dcnseg.data.image_io import AnyImage, as_rgb_array
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.errors import ConfigError, NotFiniteError, ShapeError
from dcnseg.inference.onnx_network import OnnxNetwork, is_onnx_file
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.regions import RegionMaps, Window, score_regions
from dcnseg.inference.sliding_window import predict_strips
from dcnseg.inference.strips import StripMap, cropped, resized, softmaxed, stored
from dcnseg.inference.tta import augmented
from dcnseg.models.region_head import RegionHead, RegionOutput
from dcnseg.models.segmenter import Segmenter
from dcnseg.scoring.objects import find_objects

# Values per strip: small enough for a CPU's caches, large enough for efficient GPU kernels.
STRIP_VALUES: Final = {"cpu": 1 << 21, "cuda": 1 << 26}

ReadWindow = Callable[[slice, slice], npt.NDArray[np.uint8] | None]


class Predictor:
    """Applies a trained network to images.

    Attributes:
        model: The network, in evaluation mode on `device`.
        class_map: Names, ids and colors of the K classes.
        preprocessing: Normalization and scale that the weights were trained with.
        training_data: Statistics of the training images, if known.
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
        training_data: TrainingDataStats | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.class_map = class_map
        self.preprocessing = preprocessing
        self.device = device
        self.amp_dtype = amp_dtype
        self.config = config or PredictConfig()
        if self.config.min_confidence and not class_map.ignored_ids:
            raise ConfigError(
                f"--min-confidence is {self.config.min_confidence}, but no id is available for the "
                "pixels below it: 255 is a class, and no id is ignored. Remove the option, or use "
                "--save confidence."
            )
        if self.config.min_region_score:
            self.region_head()
        self.training_data = training_data
        self._mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1) * 255

    def region_head(self) -> RegionHead:
        """Return the region head of the network.

        Raises:
            ConfigError: It has none.
        """
        return self.model.require_region_head()

    @property
    def has_region_head(self) -> bool:
        """Whether the network has a region head."""
        return isinstance(self.model, Segmenter) and self.model.region_head is not None

    @property
    def has_own_preprocessing(self) -> bool:
        """Whether the network takes images as uint8, which it scales and normalizes itself."""
        return bool(getattr(self.model, "has_preprocessing", False))

    @property
    def region_min_area(self) -> int:
        """The area of the smallest region in pixels of the image."""
        return max(1, round(self.region_head().min_area / self.preprocessing.input_scale**2))

    def with_config(self, **changes: Any) -> Predictor:
        """Return a predictor with the same network and other settings of `PredictConfig`."""
        changed = copy(self)
        changed.config = replace(self.config, **changes)
        return changed

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
            config: Windows, test-time augmentation, the minimum confidence and the minimum score
                of regions.

        Raises:
            CheckpointError: The weights are missing, damaged, of a newer version, or do not match
                the model and classes in the file's metadata.
            ConfigError: The device is not available, there is no id for the pixels below the
                minimum confidence, or there is no region head for the minimum score of regions.
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

    @classmethod
    def from_onnx(
        cls, path: Path | str, *, device: str = "auto", config: PredictConfig | None = None
    ) -> Predictor:
        """Load a model of `dcnseg export`, which ONNX Runtime runs.

        The results are those of the run that was exported, without regions. If the model takes
        uint8 images, they are rounded to 8 bits after scaling for `config.scales`.

        Args:
            path: ONNX model with the output `logits`.
            device: "auto", "cpu" or "cuda:1"; "cuda" needs the package onnxruntime-gpu.
            config: As for `from_checkpoint`.

        Raises:
            CheckpointError: The file is missing or damaged, or was not written by dcnseg.
            ConfigError: ONNX Runtime is not installed or does not support the device, or a setting
                is not supported.
        """
        network = OnnxNetwork(Path(path), device)
        info = network.info
        return cls(
            network,  # type: ignore[arg-type]  # it has what prediction needs of a Segmenter
            info.class_map,
            info.preprocessing,
            device=network.device,
            config=config,
            training_data=info.training_data,
        )

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        amp: str = "off",
        config: PredictConfig | None = None,
    ) -> Predictor:
        """Load a run folder or weights file (`from_checkpoint`), or an ONNX model (`from_onnx`).

        The arguments and errors are those of the two functions.

        Raises:
            ConfigError: `amp` is not "off" for an ONNX model.
        """
        if not is_onnx_file(Path(path)):
            return cls.from_checkpoint(path, device=device, amp=amp, config=config)
        if amp != "off":
            raise ConfigError(
                f"--amp is {amp}, but exported models run in float32. Remove the option."
            )
        return cls.from_onnx(path, device=device, config=config)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Resize an image by `input_scale` and normalize it.

        Args:
            image: RGB, uint8 [H, W, 3].

        Returns:
            float32 [1, 3, h, w], h = max(1, round(H * input_scale)); for a network that prepares
            its input itself, the image as uint8 [1, 3, H, W].

        Raises:
            ShapeError: the image is not uint8 [H, W, 3] with at least one pixel.
        """
        _check_image(image)
        x = torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1)
        if self.has_own_preprocessing:
            return x[None]
        x = x.float().sub_(self._mean).div_(self._std)[None]
        if self.preprocessing.input_scale != 1:
            size = scaled_size_hw(x.shape[-2:], self.preprocessing.input_scale)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        return x.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def predict(
        self,
        image: AnyImage,
        *,
        with_confidence: bool = False,
        with_probabilities: bool = False,
        regions: bool = False,
    ) -> Prediction:
        """Label every pixel of an image of any size.

        Args:
            image: A file, a PIL image, or an array as `as_rgb_array` takes it.
            with_confidence: Whether to keep the probability of the chosen class, H * W * 2 bytes.
            with_probabilities: Whether to keep all probabilities, K * H * W * 2 bytes.
            regions: Whether to find the regions and score them; needs a network with a region
                head. Regions are pooled from the image itself, not from augmented views.

        Raises:
            ConfigError: The network has no region head.
            DataError: The file cannot be read.
            ShapeError: The array has another shape or dtype than images have.
            NotFiniteError: The network's output has NaN or infinity.
        """
        has_regions = regions or self.config.min_region_score > 0
        if has_regions:
            self.region_head()  # raises early
        image = as_rgb_array(image)
        height, width = image.shape[:2]
        num_classes = self.class_map.num_classes
        labels = np.empty((height, width), np.uint8)
        confidence = None
        if with_confidence or has_regions:
            confidence = np.empty((height, width), np.float16)
        maps = RegionMaps(partial(self._compute_region_map, image)) if has_regions else None
        probabilities = None
        if with_probabilities:
            probabilities = np.empty((num_classes, height, width), np.float16)
        for top, strip in self.predict_strips(
            lambda rows, columns: image[rows, columns], (height, width), maps=maps
        ):
            rows = slice(top, top + strip.shape[1])
            labels[rows], highest = self.label_strip(strip)
            if confidence is not None:
                confidence[rows] = highest.half().cpu().numpy()
            if probabilities is not None:
                probabilities[:, rows] = strip.half().cpu().numpy()
        prediction = Prediction(labels, self.class_map, confidence, probabilities, image)
        if maps is not None:
            prediction = self._with_regions(prediction, maps)
        return prediction.without_low_regions(self.config.min_region_score)

    @property
    def window_side(self) -> int:
        """The side of a window in pixels of the image."""
        return max(1, round(self.config.window / self.preprocessing.input_scale))

    @property
    def map_bytes(self) -> float:
        """The memory of a window's result before it is blended, in bytes per pixel of the image."""
        stride = self.model.logits_stride if isinstance(self.model, Segmenter) else 1
        views = sum(scale**2 for scale in self.config.scales) * (2 if self.config.flip else 1)
        density = views * (self.preprocessing.input_scale / stride) ** 2
        return torch.float32.itemsize * self.class_map.num_classes * density

    def predict_strips(
        self,
        read_window: ReadWindow,
        size_hw: tuple[int, int],
        *,
        columns: slice | None = None,
        maps: RegionMaps | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Predict the probabilities of an image that is read window by window.

        Use it within `torch.inference_mode()`.

        Args:
            read_window: Maps the rows and columns of a window to its pixels, uint8 [h, w, 3], or to
                None if no pixel of the window matters; called from top to bottom.
            size_hw: Image size in pixels.
            columns: Columns of the image to predict, by default all.
            maps: Receives the windows and their region maps.

        Yields:
            First row of a strip and its probabilities, float32 [K, rows, columns], from top to
            bottom.

        Raises:
            NotFiniteError: The network's output has NaN or infinity.
        """
        columns = columns or slice(0, size_hw[1])
        strip_values = STRIP_VALUES.get(self.device.type, STRIP_VALUES["cuda"])
        row_values = self.class_map.num_classes * (columns.stop - columns.start)
        return predict_strips(
            self._window_predictor(read_window, maps),
            size_hw,
            (self.window_side, self.window_side),
            self.config.overlap,
            max_rows=max(1, strip_values // row_values),
            columns=columns,
        )

    def label_strip(self, strip: Tensor) -> tuple[npt.NDArray[np.uint8], Tensor]:
        """Return the label of each pixel, as in `Prediction.labels`, and its probability.

        Args:
            strip: Probabilities [K, rows, columns].
        """
        highest, indices = strip.max(dim=0)  # faster than argmax
        indices[highest < self.config.min_confidence] = IGNORE_INDEX
        return indices.to(torch.uint8).cpu().numpy(), highest

    def _with_regions(self, prediction: Prediction, maps: RegionMaps) -> Prediction:
        labels, confidence = prediction.labels, prediction.confidence
        assert confidence is not None
        objects = find_objects(labels, self.class_map.object_indices, self.region_min_area)
        found = score_regions(objects, confidence, self._apply_region_head, maps, self._input_size)
        return replace(prediction, regions=found, region_numbers=objects.numbers)

    def predict_batch(
        self,
        images: Iterable[AnyImage],
        *,
        with_confidence: bool = False,
        with_probabilities: bool = False,
        regions: bool = False,
    ) -> list[Prediction]:
        """Label several images, which may differ in size; the arguments are those of `predict`."""
        return [
            self.predict(
                image,
                with_confidence=with_confidence,
                with_probabilities=with_probabilities,
                regions=regions,
            )
            for image in images
        ]

    def _window_predictor(
        self, read_window: ReadWindow, maps: RegionMaps | None
    ) -> Callable[[slice, slice], StripMap]:
        """Return a function that maps the rows and columns of a window to its probabilities.

        The windows and their region maps are added to `maps`.
        """

        def predict_window(rows: slice, columns: slice) -> StripMap:
            window = read_window(rows, columns)
            if window is None:
                return self._uniform(rows.stop - rows.start, columns.stop - columns.start)
            x = self.prepare(window)
            fused: list[Tensor] = []

            def predict_view(view: Tensor) -> StripMap:
                # Regions are pooled from the window itself, not from its augmented views.
                keep = fused.append if maps is not None and view is x else None
                return self._predict_probabilities(view, keep)

            predict = augmented(predict_view, flip=self.config.flip, scales=self.config.scales)
            probabilities = resized(predict(x), (window.shape[0], window.shape[1]))
            if maps is not None:
                place = Window(columns.start, rows.start, columns.stop, rows.stop)
                maps.add(place, next(iter(fused), None))
            return probabilities

        return predict_window

    def _uniform(self, height: int, width: int) -> StripMap:
        """Return equal probabilities of all classes."""
        num_classes = self.class_map.num_classes
        return StripMap(
            (height, width),
            lambda start, stop: torch.full(
                (num_classes, stop - start, width), 1 / num_classes, device=self.device
            ),
        )

    def _predict_probabilities(
        self, x: Tensor, keep_region_map: Callable[[Tensor], None] | None = None
    ) -> StripMap:
        """Predict the probabilities of a network input, at the network's resolution."""
        height, width = x.shape[-2:]
        is_segmenter = isinstance(self.model, Segmenter)
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            # Coarse logits, which take 1/16 of the memory of upsampled ones.
            if keep_region_map is not None:
                logits, fused = self.model.coarse_logits_and_region_map(x)
                keep_region_map(fused)
            else:
                logits = self.model.coarse_logits(x) if is_segmenter else self.model(x)
        # Checked before upsampling and softmax, which keep finite values finite.
        self._check_finite(logits)
        values = stored(logits[0])
        if is_segmenter:
            stride = self.model.logits_stride
            size_hw = logits.shape[-2] * stride, logits.shape[-1] * stride
            values = cropped(resized(values, size_hw, align_corners=True), (height, width))
        return softmaxed(values)

    def _compute_region_map(self, image: npt.NDArray[np.uint8], window: Window) -> Tensor:
        """Compute the region map of a window, [1, C, h, w]."""
        x = self.prepare(image[window.top : window.bottom, window.left : window.right])
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            return self.model.region_map(x)

    def _apply_region_head(self, fused: Tensor, boxes: Sequence[Tensor]) -> RegionOutput:
        output: RegionOutput = self.region_head()(fused, boxes)
        self._check_finite(torch.cat(output, dim=1))
        return output

    def _input_size(self, window: Window) -> tuple[int, int]:
        size_hw = window.bottom - window.top, window.right - window.left
        return scaled_size_hw(size_hw, self.preprocessing.input_scale)

    def _check_finite(self, logits: Tensor) -> None:
        if bool(torch.isfinite(logits).all()):
            return
        fp16 = "Use --amp bf16 or off instead of fp16. " if self.amp_dtype == torch.float16 else ""
        raise NotFiniteError(
            "the network's output has values that are not finite (NaN or infinity). "
            f"{fp16}The weights are damaged or their training diverged; use other weights, or "
            "train again with a lower --lr."
        )


def _check_image(image: npt.NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ShapeError(
            f"`image` is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3], RGB."
        )
