from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.gpu.cases import BOXES, make_cases
from tests.ops.common import NEEDS_NATIVE

pytestmark = NEEDS_NATIVE

NAMES = ("roi_pool", "ps_roi_pool rfcn corners", "deform_roi_pool mmcv",
         "deform_ps_roi_pool paper, 1x2 groups")  # fmt: skip
CASES = [case for case in make_cases() if str(case) in NAMES]


class Several(nn.Module):
    """An operator of each kind on one map."""

    def forward(self, input: Tensor, boxes: Tensor, offset: Tensor) -> list[Tensor]:
        tensors = {"input": input, BOXES: boxes, "offset": offset}
        return [case.call("auto", tensors) for case in CASES]


def make_tensors() -> tuple[Tensor, Tensor, Tensor]:
    tensors = CASES[-1].make(torch.float32)
    return tensors["input"], tensors[BOXES], tensors["offset"]


def test_compiles_without_a_graph_break_for_any_number_of_boxes() -> None:
    compiled = torch.compile(Several(), fullgraph=True, backend="aot_eager")
    input, boxes, offset = make_tensors()
    for count in (5, 20):
        results = []
        for model in (Several(), compiled):
            x, o = (t.clone().requires_grad_() for t in (input, offset[:count]))
            some = boxes[:count].clone()
            for tensor in (some, o):
                torch._dynamo.mark_dynamic(tensor, 0)
            outputs = model(x, some, o)
            total = torch.stack([output.square().sum() for output in outputs]).sum()
            results.append([*outputs, *torch.autograd.grad(total, (x, o))])
        torch.testing.assert_close(*results)
    some[1, 0] = 2.0  # raises in eager mode
    for output in compiled(x, some, o):
        assert output[1].isnan().all()


def test_exports_with_any_number_of_boxes() -> None:
    input, boxes, offset = make_tensors()
    count = torch.export.Dim("count", min=2, max=1000)
    program = torch.export.export(
        Several(), (input, boxes[:5], offset[:5]), dynamic_shapes=(None, {0: count}, {0: count})
    )
    expected = Several()(input, boxes, offset)
    torch.testing.assert_close(program.module()(input, boxes, offset), expected)
