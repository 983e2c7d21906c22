"""The commands of the README and of docs/ run, and what the pages refer to exists.

Commands run on generated data, at a size that takes seconds. The snippets are run by
test_python_page and test_operators_page.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from dcnseg.data.class_map import ClassMap
from dcnseg_cli.main import app
from tests.conftest import SMALL_TRAINING, Invoke
from tests.geotiff import random_bands, write_geotiff

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Appended to the options of a page: the last value of an option counts.
SMALL_OPTIONS = (*SMALL_TRAINING, "--eval-every=1", "--overwrite")
OTHER_OPTIONS = {
    *("--help", "--index-url", "--hypothesis-profile", "--rounds"),
    # of torchrun and Slurm
    *("--nnodes", "--nproc-per-node", "--max-restarts", "--shutdown-timeout"),
    *("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--array", "--gres"),
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = (line.strip() for line in "".join(blocks(page, "sh")).splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("dcnseg ")]


def commands_by_page() -> dict[Path, list[list[str]]]:
    """The commands of each page that no earlier page has."""
    seen: list[list[str]] = []
    found: dict[Path, list[list[str]]] = {}
    for page in PAGES:
        found[page] = [command for command in commands(page) if command not in seen]
        seen += found[page]
    return {page: new for page, new in found.items() if new}


def extra_options(command: list[str]) -> tuple[str, ...]:
    if "--resume" in command:
        return "--epochs=3", "--device=cpu"
    two_runs = ("--seeds=1", "--variants=plain,deformable")
    without_device = {
        "train": SMALL_OPTIONS,
        "evaluate": ("--device=cpu", "--overwrite"),
        "compare": (*SMALL_OPTIONS, *two_runs),
        "check": (),
        "export": (),
        "info": (),
        "report": (),
    }
    options = without_device.get(command[0], ("--device=cpu",))
    has_weights = "--init" in command  # instead of those of the encoder
    return tuple(o for o in options if not (has_weights and o.startswith("--encoder-weights")))


@pytest.fixture
def folder(scenes: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data and the run that the pages speak of."""
    for name in ("photos", "camvid", "crackforest", "scenes"):
        shutil.copytree(scenes, tmp_path / name)
    for name in ("photos", "plain"):
        shutil.copytree(run, tmp_path / "runs" / name)
    pairs = []
    for image in sorted(scenes.glob("*/images/*")):
        split, mask = image.parts[-3], image.parents[1] / "masks" / f"{image.stem}.png"
        for source, target in (
            (image, f"rgb/{split}/{image.name}"),
            (mask, f"truth/{split}/{image.stem}_idx.png"),
        ):
            (tmp_path / "scans" / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / "scans" / target)
        pairs.append(f"photos/{split}/images/{image.name},photos/{split}/masks/{mask.name},{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", commands_by_page(), ids=name_of)
def test_commands(page: Path, folder: Path, invoke: Invoke) -> None:
    if page.name == "deployment.md":
        write_geotiff(folder / "orthophoto.tif", random_bands(3))
        write_geotiff(folder / "satellite.tif", random_bands(5))
    for command in commands_by_page()[page]:
        result = invoke(*command, *extra_options(command))
        assert result.exit_code == 0, (command, result.stderr)
    if page == README:
        assert len(list((folder / "predictions" / "labels").rglob("*.png"))) == 2
        assert list((folder / "offsets").rglob("*.json"))


def test_class_list() -> None:
    (text,) = blocks(ROOT / "docs" / "data.md", "json")
    class_map = ClassMap.from_dict(json.loads(text))
    assert class_map.names == ("road", "tree")
    assert class_map.ignored_ids[:1] == (2,)


def test_length_of_the_readme() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_every_command_of_the_program_is_in_the_table() -> None:
    names = {command.name for command in app.registered_commands}
    assert names == set(re.findall(r"^\| `dcnseg ([a-z-]+)", README.read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "results"], ids=name_of
)
def test_options_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    commands = group.commands.values()  # type: ignore[attr-defined]
    parameters = [parameter for command in commands for parameter in command.params]
    known = {name for one in parameters for name in (*one.opts, *one.secondary_opts)}
    mentioned = set(re.findall(r"(?<![\w#-])--[a-z][a-z-]+", page.read_text()))
    assert mentioned <= known | OTHER_OPTIONS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_files_and_sections_exist(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert section in {slug(heading) for heading in headings}, f"{target}#{section}"


def slug(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
