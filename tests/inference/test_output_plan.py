from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from dcnseg.errors import ConfigError
from dcnseg.files import is_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.output_plan import OutputPlan, plan_outputs
from dcnseg.inference.parts import Part

IMAGES = [InputImage(Path(f"{name}.png"), PurePath(name)) for name in "dbace"]


def plan(out: Path, part: str = "", **options: bool) -> OutputPlan:
    own_part = Part.parse(part) if part else None
    return plan_outputs(IMAGES, out, ("labels", "regions"), part=own_part, **options)


def write_labels(out: Path, name: str) -> None:
    (out / "labels").mkdir(parents=True, exist_ok=True)
    (out / "labels" / f"{name}.png").touch()


def test_ids_and_files_of_a_part_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = {task.image: task for task in plan(tmp_path).tasks}
    parts = [plan(tmp_path, f"{number}/2") for number in (1, 2)]
    assert [str(task.image) for task in parts[0].tasks] == ["a.png", "c.png", "e.png"]
    assert all(task == whole[task.image] for part in parts for task in part.tasks)
    merged = [part.merged_regions for part in parts]
    assert merged == [tmp_path / "regions-1-of-2.json", tmp_path / "regions-2-of-2.json"]
    assert plan(tmp_path).merged_regions == tmp_path / "regions.json"


def test_existing_outputs_of_the_own_part_are_refused(tmp_path: Path) -> None:
    plan(tmp_path).mark_folders()
    assert is_output_folder(tmp_path)
    write_labels(tmp_path, "a")
    assert len(plan(tmp_path, "2/2", refuse_existing=True).tasks) == 2
    with pytest.raises(ConfigError, match=r"1 outputs of part 1/2 exist, for example .*a\.png\. A"):
        plan(tmp_path, "1/2", refuse_existing=True)
    assert len(plan(tmp_path, "1/2").tasks) == 3


def test_images_with_some_outputs_are_not_skipped(tmp_path: Path) -> None:
    plan(tmp_path).mark_folders()
    write_labels(tmp_path, "a")
    assert plan(tmp_path, skip_existing=True).existing == []
    (tmp_path / "regions").mkdir()
    (tmp_path / "regions" / "a.json").touch()
    skipped = plan(tmp_path, "1/2", skip_existing=True)
    assert [result.image for result in skipped.skipped_results()] == [IMAGES[2]]
    assert [str(task.image) for task in skipped.tasks] == ["c.png", "e.png"]
