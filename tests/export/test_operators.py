from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dcnseg.errors import ExportError, NativeOpsError
from dcnseg.export.operators import check_layers, onnx_translations, with_torchvision_layers
from dcnseg.inference.onnx_network import open_session
from dcnseg.ops import DeformConv2d
from dcnseg.ops._native import missing_reason
from tests.export.small_network import build_model

needs_native = pytest.mark.skipif(
    missing_reason("cpu") is not None, reason="the native operators were not built"
)


def build_layer(**settings: object) -> DeformConv2d:
    torch.manual_seed(0)
    layer = DeformConv2d(8, 12, (3, 5), **settings).eval()  # type: ignore[arg-type]
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    return layer


def export_layer(layer: DeformConv2d, x: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(
        layer,
        (x,),
        input_names=["x"],
        dynamo=True,
        opset_version=22,
        verbose=False,
        custom_translation_table=onnx_translations(),
    )
    assert program is not None
    program.save(path)


@needs_native
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": (2, 1), "padding": (1, 3), "dilation": (2, 1), "bias": False},
        {"padding": "same", "groups": 4, "offset_groups": 2, "modulated": True},
    ],
    ids=["default", "window", "groups"],
)
def test_layers_are_translated_to_onnx(settings: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer = build_layer(**settings)
    x = torch.randn(2, 8, 11, 14)
    export_layer(layer, x, tmp_path / "layer.onnx")
    session = open_session(runtime, tmp_path / "layer.onnx")
    (output,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), layer(x), atol=1e-4, rtol=1e-4)


@needs_native
def test_a_border_that_onnx_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(torch.onnx.OnnxExporterError) as error:  # caused by ours
        export_layer(build_layer(border="dcnv1"), torch.randn(1, 8, 9, 9), tmp_path / "no.onnx")
    causes: list[BaseException] = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any('a deformable convolution has border="dcnv1"' in str(cause) for cause in causes)


def test_the_border_of_layers_is_checked() -> None:
    network = nn.Sequential(DeformConv2d(4, 4, 3), DeformConv2d(4, 4, 3, border="dcnv1"))
    check_layers(network[:1], "onnx")
    with pytest.raises(ExportError, match=r"the layer 1 has border='dcnv1', which --format onnx"):
        check_layers(network, "onnx")


def test_native_operators_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcnseg.export.operators.missing_reason", lambda _: "not built")
    with pytest.raises(NativeOpsError, match="which ONNX has a rule for, is not built"):
        onnx_translations()


@pytest.mark.parametrize("padding", [1, "same"])
def test_torchvision_layers_compute_the_same(padding: int | str) -> None:
    network = build_model()
    name, layer = next(iter(network.deformable_layers().items()))
    layer.padding = (1, 1) if padding == 1 else "same"
    x = torch.randn(1, layer.in_channels, 9, 12)
    replaced = with_torchvision_layers(network)
    assert not replaced.deformable_layers().keys() & {name}
    with torch.no_grad():
        torch.testing.assert_close(replaced.get_submodule(name)(x), layer(x), atol=1e-4, rtol=1e-4)
