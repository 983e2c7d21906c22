from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dcnseg.files import is_output_folder
from dcnseg_cli import demo_steps
from tests.conftest import Invoke


def test_demo_shows_everything(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps at a size that takes seconds; its full size is run by `make demo`."""
    config_of = demo_steps.demo_config
    monkeypatch.setattr(demo_steps, "TRAIN_SCENES", 4)
    monkeypatch.setattr(demo_steps, "VAL_SCENES", 2)
    monkeypatch.setattr(
        demo_steps,
        "demo_config",
        lambda scenes, **options: replace(config_of(scenes, **options), epochs=1),
    )
    result = invoke("demo", tmp_path / "demo", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "demo"
    assert re.search(r"mIoU 0\.\d{3} on the validation scenes", result.stdout)
    for where in ("on the same bead", "on its caps, which show the class"):
        pattern = rf"  \d+\.\d% are {where}; \d+\.\d% with the plain grid\.\n"
        assert re.search(pattern, result.stdout)
    assert (
        f"Open this first, to see where the network looks:\n  {folder}/explorer/" in result.stdout
    )
    pages = [folder / "explorer" / f"scene_000{i}.html" for i in range(2)]
    for page in pages:
        assert page.name in (folder / "explorer" / "index.html").read_text()
        assert "Ground truth" in page.read_text()
    also = result.stdout.partition("Also written:\n")[2].partition("Next")[0].splitlines()
    assert len(also) == 5
    assert all(Path(line.split(":")[1].strip()).exists() for line in also)
    assert result.stdout.endswith("  dcnseg check FOLDER\n")
    for name in ("run", "evaluation", "predictions", "offsets", "explorer"):
        assert is_output_folder(tmp_path / "demo" / name)


def test_a_used_folder_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert invoke("demo", tmp_path).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
