"""docs/operators.md: its examples run and give the shapes that they promise; its claims hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn

from dcnseg import ops

PAGE = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_examples(snippet: str) -> None:
    """Run line by line; a comment that is a shape must be the shape of what stands before it."""
    names: dict[str, Any] = {}
    for statement in ast.parse(snippet).body:
        source = ast.get_source_segment(snippet, statement)
        assert source is not None
        line = snippet.splitlines()[(statement.end_lineno or 1) - 1]
        shape = re.search(r"# (\[[\d, ]+\])$", line)
        if isinstance(statement, ast.Expr):
            result = eval(compile(source, "operators.md", "eval"), names)
        else:
            exec(compile(source, "operators.md", "exec"), names)
            result = names[statement.targets[0].id] if shape else None  # type: ignore[attr-defined]
        if shape:
            assert list(result.shape) == ast.literal_eval(shape[1]), line


def test_every_operator_has_a_section() -> None:
    sections = set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE))
    operators = {name for name in ops.__all__ if name.islower() and name != "native_status"}
    assert sections == operators


def test_halved_weight_makes_up_for_the_doubled_mask() -> None:
    """As mmcv computes: a mask of sigmoid(.) and the weight as it was stored."""
    torch.manual_seed(0)
    layer = ops.DeformConv2d(4, 6, 3, padding=1, modulated=True).double()
    assert isinstance(layer.conv_offset, nn.Conv2d)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    input = torch.randn(1, 4, 7, 8, dtype=torch.double)
    stored = layer.weight.detach().clone()
    first, second, mask = layer.conv_offset(input).chunk(3, dim=1)
    expected = torchvision.ops.deform_conv2d(
        input, torch.cat([first, second], 1), stored, layer.bias, padding=1, mask=mask.sigmoid()
    )
    layer.load_state_dict(layer.state_dict() | {"weight": stored / 2})
    torch.testing.assert_close(layer(input), expected)


def test_torchvisions_ps_roi_pool_leaves_out_the_last_row_and_column() -> None:
    input = torch.arange(36.0).view(1, 1, 6, 6).requires_grad_()
    boxes = torch.tensor([[0.0, 0, 0, 6, 6]])

    def pool(operator: Any) -> tuple[Tensor, Tensor]:
        output = operator(input, boxes, 1)
        (grad,) = torch.autograd.grad(output.sum(), input)
        return output.squeeze(), grad

    theirs, their_grad = pool(torchvision.ops.ps_roi_pool)
    ours, our_grad = pool(ops.ps_roi_pool)
    assert theirs == input[0, 0, :5, :5].mean()
    assert ours == input.mean()
    torch.testing.assert_close(their_grad, our_grad)  # 1/36 everywhere


def test_mmcv_mode_without_offsets_is_roi_align() -> None:
    torch.manual_seed(0)
    input = torch.randn(1, 3, 20, 25, dtype=torch.double)
    boxes = torch.tensor([[0, 10.3, 20.1, 250.7, 200.2], [0, -30, -20, 90, 500]]).double()
    for ratio in (0, 2):
        expected = torchvision.ops.roi_align(input, boxes, 7, 1 / 16, ratio, aligned=True)
        actual = ops.deform_roi_pool(
            input, boxes, None, 7, 1 / 16, mode="mmcv", sampling_ratio=ratio
        )
        torch.testing.assert_close(actual, expected)
