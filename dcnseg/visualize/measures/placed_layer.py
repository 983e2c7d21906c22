"""The sampling points of a layer at the pixels of one image; entry point `place_layer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcnseg.scoring.counts import Floats
from dcnseg.visualize.measures.pixel_groups import Integers
from dcnseg.visualize.offsets import LayerOffsets, find_nearest_location


@dataclass(frozen=True)
class PlacedLayer:
    """A layer's sampling points in an image; M = G*T points for each of L output locations.

    Attributes:
        layer: The offsets.
        is_inside: Whether the pixel nearest to the output location is in the image, [H_out, W_out].
        is_measured: Those of them with finite offsets and modulation, [H_out, W_out].
        locations_yx: All output locations in image pixels, float64 [L, 2].
        displacements: Points relative to their location in image pixels, float64 [M, L, 2], by
            kind: "own", "plain" (without offsets) and "shuffled" (those of a random other measured
            location of the image).
        weights: Modulation, float64 [M, L], or None.
    """

    layer: LayerOffsets
    is_inside: npt.NDArray[np.bool_]
    is_measured: npt.NDArray[np.bool_]
    locations_yx: Tensor
    displacements: Mapping[str, Tensor]
    weights: Tensor | None

    @property
    def sites(self) -> Integers:
        """Indices of the measured locations, [N]."""
        return np.flatnonzero(self.is_measured)

    def pixels(self, sites: Integers) -> tuple[Integers, Integers]:
        """Rows and columns of the pixels nearest to locations [N]."""
        rows, columns = np.floor(self.locations_yx.numpy()[sites] + 0.5).astype(np.int64).T
        return rows, columns

    def points(self, kind: str, sites: Integers) -> Floats:
        """Sampling points (y, x) of locations [N] in image pixels, [M, N, 2]."""
        chosen = torch.from_numpy(sites)
        displacement = self.displacements[kind][:, chosen]
        return np.asarray((self.locations_yx[chosen] + displacement).numpy())


def place_layer(
    layer: LayerOffsets, image_hw: tuple[int, int], rng: np.random.Generator
) -> PlacedLayer:
    """Compute a layer's sampling points, and draw the order of the shuffled ones from `rng`."""
    geometry = layer.output_geometry
    axes, is_on_axis = [], []
    for axis, size in enumerate(layer.offset.shape[-2:]):
        steps = torch.arange(size, dtype=torch.float64)
        places = geometry.origin_px[axis] + geometry.stride_px[axis] * steps
        pixels = np.floor(places.numpy() + 0.5)
        axes.append(places)
        is_on_axis.append((pixels >= 0) & (pixels < image_hw[axis]))
    locations = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    is_inside = is_on_axis[0][:, None] & is_on_axis[1]
    is_finite = layer.offset.isfinite().flatten(0, 2).all(0).numpy()
    if layer.mask is not None:
        is_finite &= layer.mask.isfinite().flatten(0, 1).all(0).numpy()
    is_measured = is_inside & is_finite

    own, plain = (
        layer.displacement_px(is_plain=is_plain).flatten(0, 1).flatten(2).transpose(1, 2)
        for is_plain in (False, True)
    )
    sites = np.flatnonzero(is_measured)
    shuffled = own.clone()
    shuffled[:, torch.from_numpy(sites)] = own[:, torch.from_numpy(rng.permutation(sites))]
    return PlacedLayer(
        layer,
        is_inside,
        is_measured,
        locations,
        {"own": own, "plain": plain, "shuffled": shuffled},
        None if layer.mask is None else layer.mask.double().flatten(0, 1).flatten(1),
    )


def choose_paths(
    layers: Sequence[PlacedLayer], max_paths: int, rng: np.random.Generator
) -> Integers:
    """Choose paths through the sampling points of consecutive layers, in forward order.

    Returns:
        The sampling point of each layer, [layers, P]: all paths, or `max_paths` different ones
        drawn from `rng` if there are more.
    """
    shape = [len(layer.displacements["own"]) for layer in layers]
    total = int(np.prod(shape))
    chosen = np.arange(total)
    if total > max_paths:
        chosen = rng.choice(total, max_paths, replace=False)
    return np.stack(np.unravel_index(chosen, shape))


def trace_paths(
    layers: Sequence[PlacedLayer], kind: str, paths: Integers, sites: Integers
) -> tuple[Floats, Floats]:
    """Trace locations of the last layer back along the given paths, as `trace_cascade` does.

    Args:
        layers: One or more layers in forward order.
        kind: "own", "plain" or "shuffled".
        paths: The result of `choose_paths`, [layers, P].
        sites: Locations of the last layer, [N].

    Returns:
        The points (y, x) in image pixels, [P, N, 2], and the product of the modulation, [P, N].
    """
    positions = layers[-1].locations_yx[torch.from_numpy(sites)].expand(paths.shape[1], -1, -1)
    weights = torch.ones(positions.shape[:2], dtype=torch.float64)
    for layer, taps in zip(reversed(layers), torch.from_numpy(paths).flip(0), strict=True):
        rows, columns = find_nearest_location(layer.layer, positions.reshape(-1, 2))
        places = (rows * layer.layer.offset.shape[-1] + columns).view(weights.shape)
        taps = taps[:, None]  # [P, 1]
        positions = positions + layer.displacements[kind][taps, places]
        if layer.weights is not None:
            weights = weights * layer.weights[taps, places]
    return np.asarray(positions.numpy()), np.asarray(weights.numpy())
