from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcnseg.visualize.geometry import MapGeometry, trace_map_geometry


class SameConv(nn.Conv2d):
    """Pads outside the layer, with the odd pixel at the end, like EfficientNet."""

    def forward(self, input: Tensor) -> Tensor:
        pads = [
            max((-(-size // s) - 1) * s + k - size, 0)
            for size, s, k in zip(input.shape[-2:], self.stride, self.kernel_size, strict=True)
        ]
        top, left = pads[0] // 2, pads[1] // 2
        return super().forward(F.pad(input, (left, pads[1] - left, top, pads[0] - top)))


class Padded(nn.Module):
    """Pads its input at the bottom and right to a multiple of 16."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return self.body(F.pad(x, (0, -width % 16, 0, -height % 16)))  # type: ignore[no-any-return]


def conv(kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(1, 1, kernel_size, stride, padding, dilation, bias=False)


NETWORKS = {
    # Average instead of maximum pooling, for a dense gradient.
    "resnet": lambda: nn.Sequential(
        conv(7, 2), nn.AvgPool2d(3, 2, 1), conv(3, 2), conv(1, 2), conv(3, 1, 2)
    ),
    "vgg": lambda: nn.Sequential(conv(3), nn.AvgPool2d(2), conv(3), nn.AvgPool2d(2), conv(3)),
    "same": lambda: nn.Sequential(
        SameConv(1, 1, 3, 2, bias=False), conv(3), SameConv(1, 1, 5, 2, bias=False)
    ),
    "unpadded": lambda: nn.Sequential(nn.Conv2d(1, 1, 5, 3, bias=False), conv(3)),
}


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("size_hw", [(160, 224), (150, 201)])
def test_geometry_is_the_center_of_the_receptive_field(name: str, size_hw: tuple[int, int]) -> None:
    model = Padded(NETWORKS[name]()).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x = torch.zeros(1, 1, *size_hw, dtype=torch.float64, requires_grad=True)
    with trace_map_geometry(model) as trace:
        output = model(x)
    geometry = trace.of((int(output.shape[-2]), int(output.shape[-1])))
    row, column = output.shape[-2] // 2, output.shape[-1] // 2
    (gradient,) = torch.autograd.grad(output[0, 0, row, column], x)
    for axis, index in enumerate((row, column)):
        profile = gradient[0, 0].sum(1 - axis)
        center = (profile * torch.arange(len(profile))).sum() / profile.sum()
        found = geometry.origin_px[axis] + index * geometry.stride_px[axis]
        assert found == pytest.approx(float(center), abs=1e-9)


def test_resnet_maps_start_at_the_first_pixel() -> None:
    model = nn.Sequential(conv(7, 2), nn.MaxPool2d(3, 2, 1), conv(3, 2))
    with trace_map_geometry(model) as trace:
        model(torch.zeros(1, 1, 64, 96))
    assert trace.of((8, 12)) == MapGeometry((8, 8), (0, 0))


def test_untraced_reduction_is_assumed_to_be_a_power_of_two() -> None:
    class Blur(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3, 2, 1)

    model = nn.Sequential(conv(3), Blur(), Blur(), conv(3))
    with trace_map_geometry(model) as trace:
        model(torch.zeros(1, 1, 50, 70))
    assert trace.of((13, 18)) == MapGeometry((4, 4), (0, 0))


def test_hooks_are_removed_after_an_error() -> None:
    model = nn.Sequential(conv(3))
    with pytest.raises(RuntimeError), trace_map_geometry(model):
        model(torch.zeros(1, 2, 8, 8))
    assert not model[0]._forward_hooks


def test_in_image_aligns_the_outer_edges() -> None:
    found = MapGeometry((16, 16), (0, 0)).in_image((180, 240), (360, 480))
    assert found == MapGeometry((32, 32), (0.5, 0.5))
    # Slightly different factors: 333/166 and 480/240.
    found = MapGeometry((8, 8), (3.5, 3.5)).in_image((166, 240), (333, 480))
    assert found.stride_px == pytest.approx((8 * 333 / 166, 16))
    assert found.origin_px == pytest.approx((4 * 333 / 166 - 0.5, 7.5))
