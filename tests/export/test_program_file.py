from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dcnseg.config import ExportConfig
from dcnseg.export.exporting import export_network
from dcnseg.export.program_file import METADATA_FILE
from tests.export.small_network import save_small_weights

# Without dcnseg, as in another program.
CODE = """
import sys, torch, torchvision
extra = {"dcnseg.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
labels, logits = module(torch.zeros(1, 50, 71, 3, dtype=torch.uint8))
assert not any(name.startswith("dcnseg") for name in sys.modules)
assert logits.shape == (1, 3, 50, 71)
print(list(labels.shape), extra["dcnseg.json"])
"""


def test_pixels_to_labels(tmp_path: Path) -> None:
    weights = save_small_weights(tmp_path / "best.safetensors")
    out = tmp_path / "model.pt2"
    result = export_network(weights, out, ExportConfig("pt2"))
    assert result.parity.equal_labels >= 0.9999
    assert METADATA_FILE in CODE
    loaded = subprocess.run(
        [sys.executable, "-c", CODE, out], capture_output=True, text=True, check=True
    )
    shape, _, metadata = loaded.stdout.partition("] ")
    assert shape == "[1, 50, 71"
    assert json.loads(metadata)["export"]["format"] == "pt2"
