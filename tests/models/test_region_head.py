"""The region head, compared with loops over regions, bins and pixels written from the papers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.config import REGION_HEADS
from dcnseg.models import region_head
from dcnseg.models.region_head import CLASS_LAYERS, RegionHead, decode_boxes, encode_boxes
from dcnseg.ops import OFFSET_BRANCHES
from dcnseg.ops.roi.checks import Corners
from tests.ops.roi_cases import bins_along, extent

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]

POOLINGS = REGION_HEADS[1:]
CHANNELS = (3, 4, 5, 4, 7, 6)  # of an encoder's features, starting with the input
MAP_HW = (6, 8)
# In pixels of two images of 48x64; corners are rounded to multiples of 8.
BOXES = [
    [
        [5.0, 3.0, 44.0, 41.0],
        [-20.0, -9.0, 30.0, 29.0],  # across the top left corner
        [18.0, 11.0, 20.0, 13.0],  # smaller than a pixel of the map
    ],
    [
        [40.0, 20.0, 90.0, 70.0],  # across the bottom right corner
        [100.0, 100.0, 130.0, 120.0],  # outside
        [0.0, 0.0, 64.0, 48.0],  # the whole image
        [12.0, 4.0, 60.0, 12.0],  # half a pixel of the map is rounded away from zero
    ],
]


def build(
    pooling: str, *, num_classes: int = 3, bins: int = 3, output_stride: int = 16
) -> RegionHead:
    return RegionHead(
        pooling,
        encoder_channels=CHANNELS,
        output_stride=output_stride,
        num_classes=num_classes,
        bins=bins,
        min_area=1,
    )


def build_random(pooling: str, scale: float = 0.1, **settings: int) -> RegionHead:
    """A head in float64 whose weights are all random, those of the offsets too."""
    torch.manual_seed(3)
    head = build(pooling, **settings).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=scale)
    return head


def random_features(batch: int = 2) -> list[Tensor]:
    """Features of two images of 48x64 and stride 16; only those of stride 8 and 16 are used."""
    sides = [[48 // stride, 64 // stride] for stride in (1, 2, 4, 8, 16, 16)]
    pairs = zip(CHANNELS, sides, strict=True)
    return [torch.randn(batch, channels, *side, dtype=torch.float64) for channels, side in pairs]


def random_map(batch: int = 2) -> Tensor:
    return torch.randn(batch, region_head.MAP_CHANNELS, *MAP_HW, dtype=torch.float64).relu()


def as_tensors(boxes: Sequence[Sequence[Sequence[float]]]) -> list[Tensor]:
    return [torch.tensor(each, dtype=torch.float64).view(-1, 4) for each in boxes]


@pytest.fixture
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer channels, for numerical derivatives."""
    monkeypatch.setattr(region_head, "MAP_CHANNELS", 4)
    monkeypatch.setattr(region_head, "HIDDEN_CHANNELS", 8)


# The loops. Bins (i, j) are (row, column). Only the rounding of boxes to pixels is shared with the
# tests of the operators.


class Region:
    """A region of the map of an image, and its k x k bins."""

    def __init__(self, box: Sequence[float], bins: int, corners: Corners | None) -> None:
        (left, top, right, bottom), (height, width) = box, MAP_HW
        self.rows = bins_along(top, bottom, 1 / 8, bins, height, corners)
        self.columns = bins_along(left, right, 1 / 8, bins, width, corners)
        self.size_xy = [extent(*side, 1 / 8, corners)[1] for side in ((left, right), (top, bottom))]
        self.bins = bins

    def pool(self, planes: Array, i: int, j: int, offset_xy: Sequence[float] = (0, 0)) -> Array:
        """Deformable ConvNets, eq. 6 and below: the mean of the displaced bin (i, j), [C].

        delta p = 0.1 * offset * (w, h). Without an offset it is eq. 5, and eq. 1 of R-FCN.
        """
        dx, dy = (0.1 * offset * size for offset, size in zip(offset_xy, self.size_xy, strict=True))
        points = [(y + dy, x + dx) for y in self.rows[i] for x in self.columns[j]]
        total = np.zeros(len(planes))
        for y, x in points:
            total += bilinear(planes, y, x)
        return total / max(len(points), 1)

    def vote(self, maps: Array, offsets: Array | None = None) -> Array:
        """R-FCN, eq. 1 and the vote by averaging: a score for each of the C outputs, [C].

        Output c has k*k of the maps, one for each bin; `offsets` is [C, k, k, 2].
        """
        k = self.bins
        outputs = len(maps) // k**2
        scores = np.zeros(outputs)
        for c in range(outputs):
            for i in range(k):
                for j in range(k):
                    channel = c * k**2 + i * k + j
                    plane = maps[channel : channel + 1]
                    move = (0.0, 0.0) if offsets is None else offsets[c, i, j]
                    scores[c] += self.pool(plane, i, j, move)[0] / k**2
        return scores

    def offsets(self, maps: Array) -> Array:
        """Position-sensitive pooling of 2*k*k*classes maps, x before y, [classes, k, k, 2]."""
        k = self.bins
        classes = len(maps) // (2 * k**2)
        found = np.zeros((classes, k, k, 2))
        for c, i, j, axis in np.ndindex(*found.shape):
            channel = ((c * 2 + axis) * k + i) * k + j
            found[c, i, j, axis] = self.pool(maps[channel : channel + 1], i, j)[0]
        return found


def bilinear(planes: Array, y: float, x: float) -> Array:
    """Deformable ConvNets, eq. 3 and 4: sum over all pixels q of G(q, p) * planes(q), [C]."""
    total = np.zeros(len(planes))
    for qy in range(planes.shape[1]):
        for qx in range(planes.shape[2]):
            weight = max(0.0, 1 - abs(qy - y)) * max(0.0, 1 - abs(qx - x))
            if weight:
                total += weight * planes[:, qy, qx]
    return total


def convolve(weights: Weights, name: str, planes: Array) -> Array:
    """A 1x1 convolution of [C, h, w]."""
    kernel, bias = weights[f"{name}.weight"][:, :, 0, 0], weights[f"{name}.bias"]
    result = np.zeros((len(kernel), *planes.shape[1:]))
    for y, x in np.ndindex(*planes.shape[1:]):
        result[:, y, x] = kernel @ planes[:, y, x] + bias
    return result


def connect(weights: Weights, name: str, values: Array) -> Array:
    """Three fully connected layers with ReLU between them."""
    for number in (0, 2, 4):
        values = weights[f"{name}.{number}.weight"] @ values + weights[f"{name}.{number}.bias"]
        if number < 4:
            values = np.maximum(values, 0)
    return values


def loop_votes(weights: Weights, planes: Array, box: Sequence[float], bins: int) -> Array:
    """The scores of the classes and of the box of R-FCN for one region, [K + 1 + 4]."""
    is_deformable = "votes.pool.offset_branch.weight" in weights
    maps = np.concatenate(
        [convolve(weights, f"votes.{name}_maps", planes) for name in ("score", "box")]
    )
    if not is_deformable:
        return Region(box, bins, "torchvision").vote(maps)
    region = Region(without_end(box), bins, None)
    offsets = region.offsets(convolve(weights, "votes.pool.offset_branch", planes))
    return region.vote(maps, offsets)


def without_end(box: Sequence[float]) -> list[float]:
    """The last pixel of the map belongs to the boxes of deformable pooling."""
    return [box[0], box[1], box[2] - 8, box[3] - 8]


def loop_fully_connected(weights: Weights, planes: Array, box: Sequence[float], bins: int) -> Array:
    """The outputs for one region with deformable RoI pooling and fully connected layers."""
    region = Region(without_end(box), bins, None)
    pooled = np.zeros((len(planes), bins, bins))
    for i, j in np.ndindex(bins, bins):
        pooled[:, i, j] = region.pool(planes, i, j)
    offsets = connect(weights, "votes.pool.offset_branch", pooled.ravel()).reshape(2, bins, bins)
    for i, j in np.ndindex(bins, bins):
        pooled[:, i, j] = region.pool(planes, i, j, offsets[:, i, j].tolist())
    return connect(weights, "votes.layers", pooled.ravel())


def loop_fuse(weights: Weights, coarse: Array, detail: Array) -> Array:
    """The sum of the map of stride 8 and of the enlarged map of stride 16, without negatives."""
    small, large = convolve(weights, "reduce", coarse), convolve(weights, "detail", detail)
    height, width = small.shape[1:]
    for y, x in np.ndindex(*large.shape[1:]):
        # The first and the last pixels lie on each other.
        at_y = y * (height - 1) / (large.shape[1] - 1)
        at_x = x * (width - 1) / (large.shape[2] - 1)
        large[:, y, x] += bilinear(small, at_y, at_x)
    return np.maximum(large, 0)


def weights_of(head: RegionHead) -> Weights:
    return {name: value.numpy() for name, value in head.state_dict().items()}


@pytest.mark.parametrize(("num_classes", "bins"), [(3, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_loops(pooling: str, num_classes: int, bins: int) -> None:
    head = build_random(pooling, num_classes=num_classes, bins=bins)
    fused, weights = random_map(), weights_of(head)
    oracle = loop_fully_connected if pooling == "deformable-fc" else loop_votes
    expected = [
        oracle(weights, planes, box, bins)
        for planes, boxes in zip(fused.numpy(), BOXES, strict=True)
        for box in boxes
    ]
    with torch.no_grad():
        logits, deltas = head(fused, as_tensors(BOXES))
    assert logits.shape == (7, num_classes + 1)
    assert deltas.shape == (7, 4)
    output = torch.cat([logits, deltas], dim=1)
    torch.testing.assert_close(output, torch.tensor(np.array(expected)), rtol=0, atol=1e-10)
    assert output.std() > 0.02  # 1e-10 is small, compared with the outputs


def test_fuse_equals_loops() -> None:
    head, features = build_random("rfcn"), random_features()
    with torch.no_grad():
        fused = head.fuse(features)
    for i in range(2):
        expected = loop_fuse(weights_of(head), features[-1][i].numpy(), features[3][i].numpy())
        torch.testing.assert_close(fused[i], torch.tensor(expected), rtol=0, atol=1e-10)


def test_without_a_detail_path_the_last_features_have_stride_8() -> None:
    head = build_random("rfcn", output_stride=8)
    assert head.detail is None
    features = torch.randn(1, CHANNELS[-1], *MAP_HW, dtype=torch.float64)
    with torch.no_grad():
        fused = head.fuse([features])
    expected = np.maximum(convolve(weights_of(head), "reduce", features[0].numpy()), 0)
    torch.testing.assert_close(fused[0], torch.tensor(expected), rtol=0, atol=1e-10)


SOME_BOXES = [[BOXES[0][0], BOXES[0][2]], [BOXES[1][0]]]  # moved off the pixels by their offsets


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_of_the_map(pooling: str) -> None:
    head = build_random(pooling, 0.4, num_classes=1, bins=2)
    boxes = as_tensors(SOME_BOXES)
    assert torch.autograd.gradcheck(
        lambda fused: tuple(head(fused, boxes)), random_map().requires_grad_(), atol=1e-6
    )


@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_of_the_features(pooling: str) -> None:
    """Through `fuse`, with the detail path."""
    head = build_random(pooling, 0.4, num_classes=1, bins=2)
    boxes, features = as_tensors(SOME_BOXES[:1]), random_features(1)

    def run(detail: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(head.fuse([*features[:3], detail, last]), boxes))

    inputs = features[3].requires_grad_(), features[-1].requires_grad_()
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_has_a_gradient(pooling: str) -> None:
    head = build_random(pooling)
    output = head(head.fuse(random_features()), as_tensors(BOXES))
    (output.logits.square().mean() + output.deltas.square().mean()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_zero_offsets_equal_rfcn() -> None:
    """For boxes from 0: negative halves of pixels are rounded to the other side."""
    torch.manual_seed(0)
    deformable = build("deformable-rfcn").double()
    plain = build("rfcn").double()
    missing, unexpected = plain.load_state_dict(deformable.state_dict(), strict=False)
    assert not missing
    assert unexpected == [
        "votes.pool.offset_branch.weight",
        "votes.pool.offset_branch.bias",
    ]
    corners = 70 * torch.rand(2, 20, 2, 2, dtype=torch.float64)
    boxes = list(torch.cat([corners.amin(2), corners.amax(2)], dim=2))
    with torch.no_grad():
        output, expected = deformable(fused := random_map(), boxes), plain(fused, boxes)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert output.logits.std() > 1e-3


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_last_layers_of_offsets_start_at_zero(pooling: str) -> None:
    head = build(pooling)
    zero = {
        name
        for name, parameter in head.named_parameters()
        if name.endswith("weight") and not parameter.any()
    }
    assert (
        zero
        == {
            "rfcn": set(),
            "deformable-rfcn": {
                "votes.pool.offset_branch.weight",
            },
            "deformable-fc": {"votes.pool.offset_branch.4.weight"},
        }[pooling]
    )
    # The optimizer gives them their own learning rate.
    assert all(any(branch in f".{name}" for branch in OFFSET_BRANCHES) for name in zero)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_layers_that_depend_on_the_classes_are_listed(pooling: str) -> None:
    few, many = (build(pooling, num_classes=count).state_dict() for count in (3, 4))
    layers = {name.rpartition(".")[0] for name in few if few[name].shape != many[name].shape}
    assert layers == {name.rpartition(".")[0] for name in few} & {*CLASS_LAYERS}
    assert layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_regions_are_pooled_in_float32_of_a_16_bit_map(pooling: str, dtype: torch.dtype) -> None:
    head = build_random(pooling).float()
    boxes, fused = as_tensors(BOXES), random_map().to(dtype)
    with torch.no_grad():
        expected = head(fused.float(), boxes)
        for context in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
            with context:
                output = head(fused, boxes)
            assert output.logits.dtype == output.deltas.dtype == torch.float32
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.deltas, expected.deltas)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_autocast_gives_float32_outputs_and_gradients(pooling: str) -> None:
    head = build_random(pooling).float()
    features = [feature.float() for feature in random_features()]
    with torch.autocast("cpu", torch.bfloat16):
        fused = head.fuse(features)
        output = head(fused, as_tensors(BOXES))
    assert fused.dtype == torch.bfloat16
    assert output.logits.dtype == output.deltas.dtype == torch.float32
    output.logits.sum().backward()
    assert head.reduce.weight.grad is not None
    assert head.reduce.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("pooling", POOLINGS)
def test_images_may_have_no_regions(pooling: str) -> None:
    head, fused = build_random(pooling), random_map()
    with torch.no_grad():
        none = head(fused, as_tensors([[], []]))
        assert (none.logits.shape, none.deltas.shape) == ((0, 4), (0, 4))
        second = head(fused, as_tensors([[], BOXES[1]]))
        both = head(fused, as_tensors(BOXES))
    torch.testing.assert_close(second.logits, both.logits[3:])
    torch.testing.assert_close(second.deltas, both.deltas[3:])


SIDES = st.floats(0.5, 2000)
STARTS = st.floats(-1000, 9000)


@st.composite
def boxes_and_targets(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Two boxes; the second has at most 62 times the sides of the first."""
    pairs = []
    for _ in range(2):
        (start, side), target_start = (draw(STARTS), draw(SIDES)), draw(STARTS)
        target_side = side * math.exp(draw(st.floats(-6, 4.13)))
        pairs.append((start, start + side, target_start, target_start + target_side))
    (left, right, *x), (top, bottom, *y) = pairs
    return [left, top, right, bottom], [x[0], y[0], x[1], y[1]]


@given(boxes_and_targets())
def test_boxes_are_decoded_as_encoded(pair: tuple[list[float], list[float]]) -> None:
    boxes, targets = (torch.tensor([box], dtype=torch.float64) for box in pair)
    decoded = decode_boxes(boxes, encode_boxes(boxes, targets))
    torch.testing.assert_close(decoded, targets, rtol=1e-9, atol=1e-6)


@given(
    start=st.tuples(STARTS, STARTS),
    sides=st.tuples(SIDES, SIDES),
    deltas=st.tuples(st.floats(-99, 99), st.floats(-99, 99), *[st.floats(-20, 20.6)] * 2),
)
def test_deltas_are_encoded_as_decoded(
    start: tuple[float, float], sides: tuple[float, float], deltas: tuple[float, ...]
) -> None:
    """Unlike the sides of boxes, the logarithms of their factors lose digits."""
    low = torch.tensor([start], dtype=torch.float64)
    boxes = torch.cat([low, low + torch.tensor([sides], dtype=torch.float64)], dim=1)
    expected = torch.tensor([deltas], dtype=torch.float64)
    found = encode_boxes(boxes, decode_boxes(boxes, expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def known_deltas() -> Iterator[tuple[list[float], list[float]]]:
    """Deltas and the boxes that they make of (10, 20, 30, 60), by hand."""
    yield [0, 0, 0, 0], [10, 20, 30, 60]
    yield [1, -5, 0, 0], [12, 0, 32, 40]  # a tenth of the width; minus half the height
    yield [0, 0, math.log(2) / 0.2, -math.log(4) / 0.2], [0, 35, 40, 45]
    yield [5, 0, math.log(3) / 0.2, 0], [0, 20, 60, 60]  # the shift is in sides of the old box


@pytest.mark.parametrize(("deltas", "expected"), list(known_deltas()))
def test_known_boxes(deltas: list[float], expected: list[float]) -> None:
    box = torch.tensor([[10.0, 20, 30, 60]], dtype=torch.float64)
    target = torch.tensor([expected], dtype=torch.float64)
    delta = torch.tensor([deltas], dtype=torch.float64)
    torch.testing.assert_close(decode_boxes(box, delta), target)
    torch.testing.assert_close(encode_boxes(box, target), delta, rtol=1e-9, atol=1e-9)


def test_decoded_boxes_are_finite() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    wide = decode_boxes(box, torch.tensor([[0.0, 0, 1e30, -1e30]]))[0]
    assert wide[2] - wide[0] == pytest.approx(625, rel=1e-3)
    assert wide[3] == wide[1] == 5
