"""The Python snippets of docs/deployment.md, section Export, run as described there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg.inference.onnx_network import open_session

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"


def test_export(
    onnx_model: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(images[0], "photo.jpg")
    shutil.copy(onnx_model, "model.onnx")
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1]
    assert section.startswith("Export\n")
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(snippet, "deployment.md", "exec"), names)
    prediction = names["prediction"]
    assert (names["label_maps"][0] == prediction.label_map).mean() > 0.999
    assert names["names"] == prediction.class_names
    assert {int(key): tuple(color) for key, color in names["colors"].items()} == prediction.colors
    session = open_session(names["onnxruntime"], Path("layer.onnx"))
    x = torch.randn(1, 3, 32, 32)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(output), names["layer"](x).detach(), atol=1e-4, rtol=0
    )
