"""Sums over the images of a data set, from which the measures of the offsets follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dcnseg.scoring.counts import Floats
from dcnseg.visualize.measures.pixel_groups import Integers

Bools = npt.NDArray[np.bool_]

# Whose sampling points are counted: the layer's own, those of the plain grid, those with the
# offsets of a random other location, and the own ones weighted by the modulation.
KINDS: Final = ("own", "plain", "shuffled", "modulated")

LOW_MASK: Final = 0.1
HIGH_MASK: Final = 1.9  # modulation is in [0, 2]


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of the values in each cell, [cells].

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """

    count: Floats
    mean: Floats
    squares: Floats

    @classmethod
    def of(cls, cells: Integers, values: Floats, num_cells: int) -> Moments:
        """Compute the moments of values [N] by their cell [N]."""
        count = np.bincount(cells, minlength=num_cells).astype(np.float64)
        mean = np.bincount(cells, values, num_cells) / np.maximum(count, 1)
        squares = np.bincount(cells, (values - mean[cells]) ** 2, num_cells)
        return cls(count, mean, squares.astype(np.float64))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        step = other.mean - self.mean
        squares = self.squares + other.squares + step**2 * self.count * share
        return Moments(count, self.mean + step * share, squares)

    def pooled(self, is_chosen: Bools) -> tuple[int, float, float]:
        """The number of values in the chosen cells, their mean and standard deviation, or NaN."""
        count, mean, squares = (v[is_chosen] for v in (self.count, self.mean, self.squares))
        total = count.sum()
        if total == 0:
            return 0, np.nan, np.nan
        center = (count * mean).sum() / total
        variance = (squares + count * (mean - center) ** 2).sum() / total
        return int(total), float(center), float(np.sqrt(variance))


class HitCounts:
    """Sampling points on the object of their center, and all, by kind and cell.

    `locations` [cells] counts the centers.
    """

    def __init__(self, num_cells: int) -> None:
        self.locations = np.zeros(num_cells, np.int64)
        self.hits = np.zeros((len(KINDS), num_cells))
        self.points = np.zeros((len(KINDS), num_cells))

    def add(self, kind: str, cells: Integers, hits: Floats, points: Floats) -> None:
        """Add the hits [N] and points [N], or their weights, of locations in cells [N]."""
        num_cells = self.hits.shape[1]
        row = KINDS.index(kind)
        if kind == "own":
            self.locations += np.bincount(cells, minlength=num_cells)
        self.hits[row] += np.bincount(cells, hits, num_cells)
        self.points[row] += np.bincount(cells, points, num_cells)

    def share(self, kind: str, is_chosen: Bools) -> float:
        """The share of the points of the chosen cells; NaN without points."""
        row = KINDS.index(kind)
        points = self.points[row][is_chosen].sum()
        return float(self.hits[row][is_chosen].sum() / points) if points > 0 else np.nan


class OffsetShares(NamedTuple):
    """What the mean squared length of the offsets consists of; the shares add up to 1."""

    constant: float
    position: float
    content: float


class OffsetSpread:
    """Sums of offset vectors, which show how much of them depends on the place and the content."""

    def __init__(self) -> None:
        self.num_locations = 0
        self.num_maps = 0
        self.squares = 0.0
        self.sums: Floats = np.zeros(0)  # [C]
        self._by_location: Floats | None = None  # [C, L], while all maps are alike
        self._first: tuple[tuple[int, ...], bytes] | None = None

    def add(self, offset: Floats, is_measured: Bools) -> None:
        """Add the offsets of a map, [C, H, W], at the measured locations, [H, W]."""
        kept = offset[:, is_measured]
        alike = offset.shape, is_measured.tobytes()
        if self._first is None:
            self._first = alike
            self.sums = np.zeros(len(offset))
            self._by_location = np.zeros(kept.shape)
        if alike != self._first:
            self._by_location = None
        elif self._by_location is not None:
            self._by_location += kept
        self.num_maps += 1
        self.num_locations += kept.shape[1]
        self.sums += kept.sum(1)
        self.squares += float((kept**2).sum())

    @property
    def mean(self) -> Floats:
        """The mean offset vector, [C]; NaN without locations."""
        return self.sums / self.num_locations if self.num_locations else self.sums * np.nan

    @property
    def rms_px(self) -> float:
        """Root of the mean squared length of the offsets of a tap; NaN without locations."""
        if not self.num_locations:
            return np.nan
        return float(np.sqrt(self.squares / self.num_locations / (len(self.sums) / 2)))

    def shares(self) -> OffsetShares:
        """Split the mean squared length |o|^2 of the offset vector o at location l of image i.

        With the mean m over all locations and images, and the mean m(l) over the n images:

        - constant: |m|^2, a grid that is reshaped everywhere alike;
        - position: the variance of m(l) over the locations, less what n images vary by chance:
          the variance of o(l, i) around m(l), divided by n (one-way analysis of variance);
        - content: the rest.

        Position and content are NaN with a single image, or if the maps have different sizes or
        offsets that are not finite. All are NaN if all offsets are zero.
        """
        if not self.squares > 0:
            return OffsetShares(np.nan, np.nan, np.nan)
        whole = self.squares / self.num_locations
        constant = min(1.0, float((self.mean**2).sum() / whole))
        if self._by_location is None or self.num_maps < 2:
            return OffsetShares(constant, np.nan, np.nan)
        n, num_places = self.num_maps, self._by_location.shape[1]
        squares_of_means = float(((self._by_location / n) ** 2).sum()) / num_places
        between = squares_of_means / whole - constant
        within = (1 - squares_of_means / whole) * n / (n - 1)
        position = min(max(0.0, between - within / n), 1 - constant)
        return OffsetShares(constant, position, 1 - constant - position)


class MaskSums:
    """Sums of the modulation of each tap."""

    def __init__(self, num_taps: int) -> None:
        self.num_locations = 0
        self.sums = np.zeros(num_taps)
        self.num_low = 0
        self.num_high = 0

    def add(self, mask: Floats) -> None:
        """Add the modulation of N locations, [taps, N]."""
        self.num_locations += mask.shape[1]
        self.sums += mask.sum(1)
        self.num_low += int((mask < LOW_MASK).sum())
        self.num_high += int((mask > HIGH_MASK).sum())


class ObjectDilations:
    """The mean effective dilation at each object, with its area."""

    def __init__(self) -> None:
        self.areas: list[int] = []
        self.dilations_px: list[float] = []

    def add(self, numbers: npt.NDArray[np.int32], dilation: Floats, areas: Integers) -> None:
        """Add the objects that locations [N] with these numbers are on; `areas` is [objects]."""
        is_object = (numbers > 0) & (numbers <= len(areas))
        found = numbers[is_object]
        counts, sums = np.bincount(found), np.bincount(found, dilation[is_object])
        present: Iterable[int] = np.flatnonzero(counts).tolist()
        for number in present:
            self.areas.append(int(areas[number - 1]))
            self.dilations_px.append(float(sums[number] / counts[number]))
