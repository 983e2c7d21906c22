"""Every command and snippet of the README works, on generated data at a size that takes seconds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dcnseg.data.class_map import ClassMap
from dcnseg_cli.main import app
from tests.conftest import Invoke

README = (Path(__file__).parents[1] / "README.md").read_text()

# Given after the README's own options, these win: the last value of an option counts.
SMALL_TRAINING = (
    "--encoder=resnet18",
    "--encoder-weights=none",
    "--decoder-channels=16",
    "--crop-size=64",
    "--batch-size=4",
    "--epochs=1",
    "--eval-every=1",
    "--workers=0",
    "--device=cpu",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("dcnseg ")]


@pytest.fixture
def folder(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the README speaks of."""
    for name in ("photos", "camvid"):
        shutil.copytree(scenes, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_snippets(folder: Path, invoke: Invoke) -> None:
    assert [command[0] for command in commands()] == [
        "check",
        "train",
        "predict",
        "visualize-offsets",
        "train",
        "evaluate",
    ]
    for command in commands():
        extra = {"check": (), "train": SMALL_TRAINING}.get(command[0], ("--device=cpu",))
        result = invoke(*command, *extra)
        assert result.exit_code == 0, result.stderr
    assert len(list((folder / "predictions" / "labels").rglob("*.png"))) == 2
    assert list((folder / "offsets").glob("*.json"))
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), {})


def test_class_list() -> None:
    (text,) = blocks("json")
    class_map = ClassMap.from_dict(json.loads(text))
    assert class_map.names == ("road", "tree")
    assert class_map.ignored_ids[:1] == (2,)


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z]+@|TBD", README)


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        if target != "and":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_of_the_program_is_in_the_table() -> None:
    names = {command.name for command in app.registered_commands}
    assert names == set(re.findall(r"^\| `dcnseg ([a-z-]+)", README, re.MULTILINE))


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
