from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.visualize.offsets import (
    LayerOffsets,
    capture_offsets,
    compute_effective_dilation,
    compute_sampling_positions,
    trace_cascade,
)


class Network(nn.Module):
    """Deformable layers and 1x1 convolutions on a feature map of stride 4 of a padded input."""

    def __init__(self, *layers: DeformConv2d) -> None:
        super().__init__()
        # 1x1 kernels, so that deformable layers sample single image pixels.
        self.stem = nn.Conv2d(1, 2, 1, stride=4, bias=False)
        self.layers = nn.ModuleList(layers)
        self.between = nn.Conv2d(2, 2, 1, bias=False)
        for layer in layers:
            layer.backend = "reference"
        for conv in (self.stem, self.between, *layers):
            nn.init.uniform_(conv.weight, 0.5, 1.5)  # positive, so gradients do not cancel
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = self.stem(F.pad(x, (0, -width % 16, 0, -height % 16)))
        for layer in self.layers:
            x = self.between(layer(x))
        return x


def make_layer(bias: Sequence[float] | None = None, **options: int) -> DeformConv2d:
    settings = {"padding": 1, "bias": False, **options}
    layer = DeformConv2d(2, 2, 3, **settings)  # type: ignore[arg-type]
    if bias is not None and layer.conv_offset.bias is not None:
        layer.conv_offset.bias.data[:] = torch.tensor(bias)
    return layer


def use_integer_offsets(layer: DeformConv2d, seed: int) -> DeformConv2d:
    """Replace the predicted offsets by random integers."""
    generator = torch.Generator().manual_seed(seed)

    def predict(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        generator.manual_seed(seed)
        return torch.randint(-2, 3, output.shape, generator=generator).to(output.dtype)

    layer.conv_offset.register_forward_hook(predict)
    return layer


def capture_one(layer: DeformConv2d, size_hw: tuple[int, int] = (64, 96)) -> LayerOffsets:
    (found,) = capture_offsets(Network(layer), torch.rand(1, 1, *size_hw).double(), size_hw)
    return found


def find_influences(
    model: Network, size_hw: tuple[int, int], location: tuple[int, int]
) -> set[tuple[int, int]]:
    """Image pixels (x, y) with a gradient from an output location."""
    x = torch.rand(1, 1, *size_hw, dtype=torch.float64, requires_grad=True)
    output = model(x)
    (gradient,) = torch.autograd.grad(output[0, 0, location[0], location[1]], x)
    return {(int(column), int(row)) for row, column in gradient[0, 0].nonzero()}


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("location", [(7, 11), (0, 0), (15, 3)])
def test_cascade_matches_the_gradient(num_layers: int, location: tuple[int, int]) -> None:
    size_hw = (62, 90)
    layers = [use_integer_offsets(make_layer(), seed) for seed in range(num_layers)]
    model = Network(*layers)
    captured = capture_offsets(model, torch.rand(1, 1, *size_hw).double(), size_hw)
    point = (location[1] * 4.0 + 1.4, location[0] * 4.0 - 1.4)

    found = trace_cascade(captured, point)

    assert found.location_xy == (location[1] * 4, location[0] * 4)
    assert found.positions_xy.shape == (9**num_layers, 2)
    # Samples outside an inner map are zero and end the path.
    influences = find_influences(model, size_hw, location)
    predicted = {(round(x), round(y)) for x, y in _trace_paths(captured, location)}
    assert influences == {(x, y) for x, y in predicted if x < size_hw[1] and y < size_hw[0]}
    every = {(round(x), round(y)) for x, y in found.positions_xy.tolist()}
    assert predicted <= every


def _trace_paths(
    layers: Sequence[LayerOffsets], location: tuple[int, int]
) -> list[tuple[float, float]]:
    """Loop oracle: image positions (x, y) of the paths that never leave a map."""
    positions = [location]
    for layer in reversed(layers):
        height, width = layer.input_hw
        reached = []
        for row, column in positions:
            for tap in range(9):
                dy, dx = (int(v) for v in layer.offset[0, tap, :, row, column])
                y, x = row + tap // 3 - 1 + dy, column + tap % 3 - 1 + dx
                if 0 <= y < height and 0 <= x < width:
                    reached.append((y, x))
        positions = reached
    return [(4.0 * x, 4.0 * y) for y, x in positions]


def test_cascade_with_stride_and_dilation_matches_the_gradient() -> None:
    size_hw = (128, 128)
    first = use_integer_offsets(make_layer(stride=2, padding=2, dilation=2), 5)
    model = Network(first, use_integer_offsets(make_layer(), 6))
    captured = capture_offsets(model, torch.rand(1, 1, *size_hw).double(), size_hw)
    assert captured[0].input_geometry.stride_px == (4, 4)
    assert captured[1].input_geometry.stride_px == (8, 8)
    found = trace_cascade(captured, (64.0, 56.0))
    every = {(round(x), round(y)) for x, y in found.positions_xy.tolist()}
    assert every == find_influences(model, size_hw, (7, 8))


def test_sampling_positions_match_a_cascade_of_one_layer() -> None:
    layer = capture_one(use_integer_offsets(make_layer(dilation=2, padding=2), 1))
    positions = compute_sampling_positions(layer)
    assert positions.shape == (1, 9, 2, 16, 24)
    one = trace_cascade([layer], (40.0, 20.0)).positions_xy
    assert torch.equal(positions[0, :, :, 5, 10].flip(-1), one)
    plain = compute_sampling_positions(layer, is_plain=True)[0, :, :, 5, 10]
    assert plain.tolist() == [[20.0 + y, 40.0 + x] for y in (-8, 0, 8) for x in (-8, 0, 8)]


def test_tap_outside_the_image_keeps_its_offset() -> None:
    """Each tap has a different offset, so a dropped tap would change the result."""
    shifts = [0.25 * tap for tap in range(9) for _ in range(2)]
    layer = capture_one(make_layer(shifts))
    found = trace_cascade([layer, layer], (0.0, 0.0)).positions_xy
    ways = [(4 * (tap % 3 - 1 + 0.25 * tap), 4 * (tap // 3 - 1 + 0.25 * tap)) for tap in range(9)]
    expected = [(a[0] + b[0], a[1] + b[1]) for a in ways for b in ways]
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    assert found.min() == -8


def test_only_the_lookup_of_offsets_is_clamped() -> None:
    layer = capture_one(make_layer())
    offset = torch.zeros_like(layer.offset)
    offset[:, :, 0] = torch.arange(16.0)[:, None]  # dy is the row it is read at
    rowwise = LayerOffsets(**{**vars(layer), "offset": offset})
    found = trace_cascade([rowwise, layer], (40.0, 0.0)).positions_xy.reshape(9, 9, 2)
    # The upper row of taps of the last layer lies at y = -4, reads row 0 and stays at -4.
    assert sorted(set(found[0, :, 1].tolist())) == [-8, -4, 0]
    # Its lower row lies at y = 4 and reads row 1: 4 more.
    assert sorted(set(found[8, :, 1].tolist())) == [4, 8, 12]


def test_effective_dilation_of_a_plain_grid_is_exact() -> None:
    layer = capture_one(make_layer(dilation=2, padding=2))
    assert torch.equal(compute_effective_dilation(layer), torch.full((16, 24), 8.0).double())
    assert torch.equal(
        compute_effective_dilation(layer, in_image=False), torch.full((16, 24), 2.0).double()
    )
    assert layer.plain_dilation_px == 8


def test_effective_dilation_matches_a_loop() -> None:
    layer = capture_one(use_integer_offsets(make_layer(offset_groups=2), 3))
    positions = compute_sampling_positions(layer)[..., 4, 9].reshape(2, 3, 3, 2)
    distances = []
    for group in positions:
        for i in range(3):
            for j in range(3):
                for other in ((i + 1, j), (i, j + 1)):
                    if max(other) < 3:
                        distances.append(float((group[i, j] - group[other]).norm()))  # noqa: PERF401
    assert len(distances) == 24
    assert compute_effective_dilation(layer)[4, 9] == pytest.approx(sum(distances) / 24)


def test_modulation_and_groups_are_captured() -> None:
    layer = make_layer(modulated=True, offset_groups=2)
    assert layer.conv_offset.bias is not None
    layer.conv_offset.bias.data[36:] = torch.linspace(-3, 3, 18)
    found = capture_one(layer)
    assert found.offset.shape == (2, 9, 2, 16, 24)
    assert found.mask is not None
    expected = 2 * torch.linspace(-3, 3, 18).sigmoid()
    torch.testing.assert_close(found.mask[:, :, 3, 4].flatten(), expected)
    samples = trace_cascade([found, found], (8.0, 8.0))
    assert samples.positions_xy.shape == (18**2, 2)
    torch.testing.assert_close(samples.weights, torch.outer(expected, expected).flatten())
    assert (trace_cascade([found], (8.0, 8.0), is_plain=True).weights == 1).all()


def test_input_scale_uses_half_pixel_centers() -> None:
    model = Network(make_layer())
    (layer,) = capture_offsets(model, torch.rand(1, 1, 32, 48).double(), (64, 96))
    assert layer.input_geometry.stride_px == (8, 8)
    assert trace_cascade([layer], (17.0, 9.0)).location_xy == (16.5, 8.5)
    assert compute_effective_dilation(layer)[0, 0] == 8


def test_layers_are_in_forward_order_and_hooks_are_removed() -> None:
    class Swapped(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.layers[1](self.stem(x)))  # type: ignore[no-any-return]

    model = Swapped(make_layer(), make_layer())
    found = capture_offsets(model, torch.rand(1, 1, 32, 32).double(), (32, 32))
    assert [layer.name for layer in found] == ["layers.1", "layers.0"]
    with pytest.raises(RuntimeError):
        capture_offsets(model, torch.rand(1, 3, 32, 32).double(), (32, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_offsets_affect_only_their_taps() -> None:
    layer = capture_one(make_layer())
    offset = layer.offset.clone()
    offset[0, 4] = torch.nan
    broken = LayerOffsets(**{**vars(layer), "offset": offset})
    found = trace_cascade([layer, broken], (40.0, 40.0)).positions_xy.reshape(9, 9, 2)
    assert found[4].isnan().all()
    assert found[:4].isfinite().all()
    assert compute_effective_dilation(broken).isnan().all()


def test_unsupported_models_and_inputs_are_errors() -> None:
    x = torch.zeros(1, 1, 16, 16).double()
    with pytest.raises(ConfigError, match=r"no deformable layer.*--deform-layers"):
        capture_offsets(nn.Conv2d(1, 1, 3).double().eval(), x, (16, 16))
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        capture_offsets(Network(make_layer()).train(), x, (16, 16))
    with pytest.raises(ShapeError, match=r"\[2, 1, 16, 16\]"):
        capture_offsets(Network(make_layer()), x.repeat(2, 1, 1, 1), (16, 16))
    with pytest.raises(ConfigError, match="1x1"):
        compute_effective_dilation(capture_one(DeformConv2d(2, 2, 1, bias=False)))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("encoder.layer4.1.conv2", "layer 4.1 conv2"),
        ("layers.0", "layers 0"),
        ("encoder.features.12", "features 12"),
        ("encoder.blocks.5.0.conv_dw", "blocks 5.0 conv_dw"),
        ("conv", "conv"),
    ],
)
def test_titles_of_layers(name: str, title: str) -> None:
    layer = capture_one(make_layer())
    assert LayerOffsets(**{**vars(layer), "name": name}).title == title
