"""Measures of the offsets of a network over a data set; entry point `measure_offsets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.config import GRADIENT_PIXELS
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import load_pair
from dcnseg.data.image_io import read_image
from dcnseg.data.sample import Sample
from dcnseg.errors import NotFiniteError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.scoring.bootstrap import rank_correlation
from dcnseg.scoring.counts import Floats, LabelIndices
from dcnseg.visualize.measures.pixel_groups import (
    DISTANCE_NAMES,
    IGNORED,
    NO_OBJECT,
    NOT_FINITE,
    OUTSIDE,
    SIZE_NAMES,
    Integers,
    PixelGroups,
    get_cell_shape,
)
from dcnseg.visualize.measures.placed_layer import (
    PlacedLayer,
    choose_paths,
    place_layer,
    trace_paths,
)
from dcnseg.visualize.measures.receptive_field import PixelSampler, UInt8Array, measure_fields
from dcnseg.visualize.measures.results import (
    ALL,
    CLASS,
    DISTANCE,
    EVERYWHERE,
    MASKS,
    OBJECTS,
    PREDICTIONS,
    SIZE,
    CascadeMeasures,
    Dilation,
    FieldRadius,
    GroupMeasures,
    Groups,
    LayerMeasures,
    Modulation,
    OffsetMeasures,
    OnObject,
)
from dcnseg.visualize.measures.sums import (
    KINDS,
    Bools,
    HitCounts,
    MaskSums,
    Moments,
    ObjectDilations,
    OffsetSpread,
)
from dcnseg.visualize.offsets import (
    CASCADE_DEPTH,
    LayerOffsets,
    capture_offsets,
    compute_effective_dilation,
    limit_size,
)

MAX_PATHS: Final = 81  # of the 729 paths of three layers; all locations together have enough

Images = Sequence[Sample | InputImage]


def measure_offsets(
    predictor: Predictor,
    images: Images,
    *,
    seed: int = 0,
    pixels_per_class: int = GRADIENT_PIXELS,
    on_progress: Callable[[int, int], None] | None = None,
) -> OffsetMeasures:
    """Measure the offsets of a network over images, one after the other.

    The masks tell the objects; for images without masks, the predicted label map does. Each image
    is one pass through the network without windows, as in `capture_offsets`; a predicted label map
    is another one, and each pixel whose gradient is computed takes two passes back.

    Args:
        predictor: A predictor whose network has deformable layers.
        images: Images and masks, or images only.
        seed: Of the shuffled offsets and the random pixels.
        pixels_per_class: Number of pixels of each class whose effective receptive field is
            measured; 0 leaves the receptive fields out.
        on_progress: Called with the number of images that are done and their total; then again for
            the images whose receptive fields are measured.

    Raises:
        ConfigError: The network has no deformable layer.
        DataError: An image or mask cannot be read; the message names it.
        NotFiniteError: The network's output for an image without a mask is not finite.
    """
    sums = OffsetSums(predictor.class_map, seed=seed)
    sampler = PixelSampler(predictor.class_map.num_classes, pixels_per_class, seed=seed)
    report = on_progress or (lambda _done, _total: None)
    for done, (image, labels) in enumerate(_load_all(predictor, images), 1):
        network_input = limit_size(predictor.prepare(image))
        sums.add(capture_offsets(predictor.model, network_input, image.shape[:2]), labels)
        sampler.add(labels)
        report(done, len(images))
    fields = measure_fields(predictor, sampler, lambda i: _read(images[i]), on_progress=report)
    has_masks = all(isinstance(image, Sample) for image in images)
    return sums.result(labels=MASKS if has_masks else PREDICTIONS, fields=fields)


class OffsetSums:
    """Adds up the measures of one image after the other."""

    def __init__(self, class_map: ClassMap, *, seed: int = 0) -> None:
        self.class_map = class_map
        self.seed = seed
        self.num_images = 0
        self._layers: dict[str, _LayerSums] = {}
        self._cascade = _PointSums(class_map.num_classes)
        self._marked = _PointSums(class_map.num_classes)
        self._cascade_names: tuple[str, ...] = ()

    def add(
        self, layers: Sequence[LayerOffsets], labels: LabelIndices, marked: Bools | None = None
    ) -> None:
        """Add an image.

        Args:
            layers: The result of `capture_offsets`.
            labels: Training indices, uint8 [H, W]; 255 is ignored.
            marked: Marked pixels for `cascade_shares`, [H, W].
        """
        groups = PixelGroups.from_labels(labels, self.class_map)
        height, width = labels.shape
        # Seeded by the image, so that its part does not depend on the layers of the others.
        rng = np.random.default_rng((self.seed, self.num_images))
        placed = [place_layer(layer, (height, width), rng) for layer in layers]
        for layer in placed:
            if layer.layer.name not in self._layers:
                self._layers[layer.layer.name] = _LayerSums(layer.layer, groups.num_classes)
            self._layers[layer.layer.name].add(layer, groups)
        if len(placed) > 1:
            self._add_cascade(placed[-CASCADE_DEPTH:], groups, rng, marked)
        self.num_images += 1

    def _add_cascade(
        self,
        layers: Sequence[PlacedLayer],
        groups: PixelGroups,
        rng: np.random.Generator,
        marked: Bools | None,
    ) -> None:
        self._cascade_names = tuple(layer.layer.name for layer in layers)
        paths = choose_paths(layers, MAX_PATHS, rng)
        sites = layers[-1].sites
        traced = {
            kind: trace_paths(layers, kind, paths, sites) for kind in layers[-1].displacements
        }
        pixels = layers[-1].pixels(sites)
        has_weights = any(layer.weights is not None for layer in layers)
        weights = traced["own"][1] if has_weights else None
        targets = [(self._cascade, groups)]
        if marked is not None:
            is_kept = marked | (groups.numbers == IGNORED)
            numbers = np.where(is_kept, groups.numbers, np.int32(NO_OBJECT))
            targets.append((self._marked, replace(groups, numbers=numbers)))
        for sums, target in targets:
            points = {kind: target.numbers_at(positions) for kind, (positions, _) in traced.items()}
            sums.add(points, weights, pixels, groups)

    def cascade_shares(self) -> tuple[OnObject, OnObject]:
        """The cascade's points from objects: the shares on the object and on its marked pixels."""
        own, marked = (
            _group(self.class_map, None, sums.hits)[ALL][OBJECTS].on_object
            for sums in (self._cascade, self._marked)
        )
        return own, marked

    def result(
        self, *, labels: str = MASKS, fields: Mapping[str, FieldRadius] | None = None
    ) -> OffsetMeasures:
        """Compute the measures; `labels` and `fields` are passed on."""
        cascade = None
        if self._cascade_names:
            cascade = CascadeMeasures(
                self._cascade_names,
                _group(self.class_map, None, self._cascade.hits),
                self._cascade.outside_share("own"),
                self._cascade.outside_share("plain"),
            )
        return OffsetMeasures(
            self.num_images,
            labels,
            self.seed,
            tuple(sums.result(name, self.class_map) for name, sums in self._layers.items()),
            cascade,
            fields or {},
        )


class _PointSums:
    """Counts sampling points on the object of their center, and outside the image."""

    def __init__(self, num_classes: int) -> None:
        self.hits = HitCounts(int(np.prod(get_cell_shape(num_classes))))
        self._num_points = dict.fromkeys(KINDS, 0)
        self._num_outside = dict.fromkeys(KINDS, 0)

    def add(
        self,
        points: Mapping[str, npt.NDArray[np.int32]],
        weights: Floats | None,
        pixels: tuple[Integers, Integers],
        groups: PixelGroups,
    ) -> None:
        """Add sampling points.

        Args:
            points: The numbers at the points by kind, [M, N].
            weights: The modulation of the own ones, [M, N], if there is any.
            pixels: Rows and columns of their centers, [N].
            groups: The groups of the image.
        """
        centers = groups.numbers[pixels]
        cells = groups.cells_at(*pixels)
        is_counted = centers > 0  # on an object or on the background
        for kind, numbers in points.items():
            self._num_points[kind] += int((numbers != NOT_FINITE).sum())
            self._num_outside[kind] += int((numbers == OUTSIDE).sum())
            chosen = numbers[:, is_counted]
            is_known = (chosen != IGNORED) & (chosen != NOT_FINITE)
            is_hit = chosen == centers[is_counted]
            self.hits.add(kind, cells[is_counted], is_hit.sum(0), is_known.sum(0))
            if kind == "own" and weights is not None:
                of_chosen = weights[:, is_counted]
                self.hits.add(
                    "modulated",
                    cells[is_counted],
                    (of_chosen * is_hit).sum(0),
                    (of_chosen * is_known).sum(0),
                )

    def outside_share(self, kind: str) -> float:
        points = self._num_points[kind]
        return self._num_outside[kind] / points if points else np.nan


class _LayerSums:
    """Adds up the measures of a layer."""

    def __init__(self, layer: LayerOffsets, num_classes: int) -> None:
        self.offset_shape = tuple(layer.offset.shape[:3])  # [G, T, 2]
        self.num_cells = int(np.prod(get_cell_shape(num_classes)))
        nothing = Moments.of(np.zeros(0, np.int64), np.zeros(0), self.num_cells)
        self.dilation, self.relative = nothing, nothing
        self.points = _PointSums(num_classes)
        self.spread = OffsetSpread()
        self.masks = None if layer.mask is None else MaskSums(layer.mask.shape[:2].numel())
        self.objects = ObjectDilations()
        self.plain_dilations: list[float] = []
        self.num_inside = 0

    def add(self, placed: PlacedLayer, groups: PixelGroups) -> None:
        layer, sites = placed.layer, placed.sites
        pixels = placed.pixels(sites)
        self.num_inside += int(placed.is_inside.sum())
        self.spread.add(layer.offset.flatten(0, 2).double().numpy(), placed.is_measured)
        dilation = compute_effective_dilation(layer).flatten().numpy()[sites]
        self.plain_dilations.append(layer.plain_dilation_px)
        cells = groups.cells_at(*pixels)
        is_labeled = cells != IGNORED
        labeled, of_labeled = cells[is_labeled], dilation[is_labeled]
        self.dilation = self.dilation.merged(Moments.of(labeled, of_labeled, self.num_cells))
        relative = of_labeled / layer.plain_dilation_px
        self.relative = self.relative.merged(Moments.of(labeled, relative, self.num_cells))
        self.objects.add(groups.numbers[pixels], dilation, groups.areas)
        weights = None if placed.weights is None else placed.weights.numpy()[:, sites]
        points = {
            kind: groups.numbers_at(placed.points(kind, sites)) for kind in placed.displacements
        }
        self.points.add(points, weights, pixels, groups)
        if self.masks is not None and weights is not None:
            self.masks.add(weights)

    def result(self, name: str, class_map: ClassMap) -> LayerMeasures:
        num_measured = self.spread.num_locations
        means = self.spread.mean.reshape(self.offset_shape).tolist()
        areas = np.array(self.objects.areas, np.float64)
        return LayerMeasures(
            name=name,
            plain_dilation_px=float(np.mean(self.plain_dilations)),
            groups=_group(class_map, (self.dilation, self.relative), self.points.hits),
            outside_share=self.points.outside_share("own"),
            plain_outside_share=self.points.outside_share("plain"),
            rms_offset_map_px=self.spread.rms_px,
            mean_offset_map_px=tuple(tuple((y, x) for y, x in group) for group in means),
            shares=self.spread.shares(),
            modulation=None if self.masks is None else self._summarize_masks(self.masks),
            rank_correlation=rank_correlation(areas, np.array(self.objects.dilations_px)),
            not_finite_share=1 - num_measured / self.num_inside if self.num_inside else np.nan,
        )

    def _summarize_masks(self, masks: MaskSums) -> Modulation:
        count = masks.num_locations or np.nan
        means = masks.sums / count
        num_values = count * len(means)
        by_group = means.reshape(self.offset_shape[:2]).tolist()
        return Modulation(
            float(means.mean()),
            tuple(tuple(group) for group in by_group),
            masks.num_low / num_values,
            masks.num_high / num_values,
        )


def _group(
    class_map: ClassMap, dilation: tuple[Moments, Moments] | None, hits: HitCounts
) -> Groups:
    """Pool the cells of each group of locations."""
    shape = get_cell_shape(class_map.num_classes)
    sizes, classes, bins = np.indices(shape).reshape(3, -1)
    is_object = sizes < SIZE_NAMES.index("background")
    chosen: dict[str, dict[str, Bools]] = {
        ALL: {EVERYWHERE: np.ones(sizes.shape, np.bool_), OBJECTS: is_object},
        SIZE: {name: sizes == i for i, name in enumerate(SIZE_NAMES)},
        CLASS: {name: classes == i for i, name in enumerate(class_map.names)},
        DISTANCE: {name: is_object & (bins == i) for i, name in enumerate(DISTANCE_NAMES)},
    }
    return {
        by: {name: _measure_group(cells, dilation, hits) for name, cells in of_kind.items()}
        for by, of_kind in chosen.items()
    }


def _measure_group(
    is_chosen: Bools, dilation: tuple[Moments, Moments] | None, hits: HitCounts
) -> GroupMeasures:
    on_object = OnObject(*(hits.share(kind, is_chosen) for kind in KINDS))
    if dilation is None:
        return GroupMeasures(
            int(hits.locations[is_chosen].sum()), Dilation(*[np.nan] * 4), on_object
        )
    (count, *in_px), (_, *relative) = (moments.pooled(is_chosen) for moments in dilation)
    return GroupMeasures(count, Dilation(*in_px, *relative), on_object)


def _load_all(predictor: Predictor, images: Images) -> Iterator[tuple[UInt8Array, LabelIndices]]:
    """Yield each image with its training indices, from the mask or predicted."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        for image, loaded in read_ahead(pool, images, lambda image: _load(predictor, image)):
            pixels, labels = loaded.result()
            if labels is None:
                try:
                    labels = predictor.predict(pixels).labels
                except NotFiniteError as error:
                    raise NotFiniteError(f"{image}: {error}") from error
            yield pixels, labels


def _load(
    predictor: Predictor, image: Sample | InputImage
) -> tuple[UInt8Array, LabelIndices | None]:
    if isinstance(image, Sample):
        return load_pair(image, predictor.class_map)
    return image.read(), None


def _read(image: Sample | InputImage) -> UInt8Array:
    return read_image(image.image) if isinstance(image, Sample) else image.read()
