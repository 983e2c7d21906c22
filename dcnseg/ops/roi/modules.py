"""Module interface of RoI pooling without offsets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dcnseg.ops.backend import Backend
from dcnseg.ops.checks import Pair, check_choice, make_pair
from dcnseg.ops.roi.checks import CORNERS, Corners, check_product, check_scale_and_gamma
from dcnseg.ops.roi.pooling import ps_roi_pool, roi_avg_pool, roi_pool


class RoIPool(nn.Module):
    """Module interface of `roi_pool`. The attribute `backend` is "auto" by default.

    Args:
        output_size: As in `roi_pool`.
        spatial_scale: As in `roi_pool`.
    """

    def __init__(self, output_size: int | Pair, spatial_scale: float = 1.0) -> None:
        super().__init__()
        check_scale_and_gamma(spatial_scale)
        self.output_size = make_pair(output_size, "output_size")
        check_product(self.output_size, "output_size")
        self.spatial_scale = spatial_scale
        self.backend: Backend = "auto"

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool [B, C, H, W] to [R, C, kh, kw]."""
        return roi_pool(input, boxes, self.output_size, self.spatial_scale, backend=self.backend)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale:g}"


class RoIAvgPool(RoIPool):
    """Module interface of `roi_avg_pool`; arguments as in `RoIPool`."""

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool [B, C, H, W] to [R, C, kh, kw]."""
        return roi_avg_pool(
            input, boxes, self.output_size, self.spatial_scale, backend=self.backend
        )


class PSRoIPool(RoIPool):
    """Module interface of `ps_roi_pool`. The attribute `backend` is "auto" by default.

    Args:
        output_size: As in `roi_pool`.
        spatial_scale: As in `roi_pool`.
        corners: As in `ps_roi_pool`.
    """

    def __init__(
        self,
        output_size: int | Pair,
        spatial_scale: float = 1.0,
        *,
        corners: Corners = "torchvision",
    ) -> None:
        super().__init__(output_size, spatial_scale)
        check_choice(corners, "corners", CORNERS)
        self.corners: Corners = corners

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool [B, C_out*kh*kw, H, W] to [R, C_out, kh, kw]."""
        return ps_roi_pool(
            input,
            boxes,
            self.output_size,
            self.spatial_scale,
            corners=self.corners,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{super().extra_repr()}, corners={self.corners}"
