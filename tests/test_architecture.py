"""The layers of the package: imports point down only, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up; packages of one row do not import each other.
ROWS = (
    (
        *("dcnseg", "dcnseg.config", "dcnseg.errors", "dcnseg.files", "dcnseg.processes"),
        "dcnseg.validation",
    ),
    ("dcnseg.lettering",),
    ("dcnseg.tensor_pickle",),
    ("dcnseg.torch_file",),
    ("dcnseg.ops", "dcnseg.device", "dcnseg.safe_load"),
    ("dcnseg.models", "dcnseg.data"),
    ("dcnseg.checkpoint", "dcnseg.scoring"),
    ("dcnseg.inference",),
    ("dcnseg.visualize", "dcnseg.export"),
    ("dcnseg.engine",),
    ("dcnseg.report",),
    ("dcnseg.api",),
    ("dcnseg_cli",),
)
ROW_OF = {name: i for i, row in enumerate(ROWS) for name in row}
# Within a package; every module that is not listed is a leaf in the lowest row.
ROWS_WITHIN = {
    "dcnseg.data": ((), ("polygons",), ("dataset", "pairing"), ("check",)),
    "dcnseg.visualize": ((), ("figures", "measures"), ("report",), ("run",), ("explorer",)),
}
ROW_WITHIN = {
    f"{package}.{name}": i
    for package, rows in ROWS_WITHIN.items()
    for i, row in enumerate(rows)
    for name in row
}
NO_TORCH = ROWS[0]

FILES = sorted([*(ROOT / "dcnseg").rglob("*.py"), *(ROOT / "cli" / "dcnseg_cli").rglob("*.py")])


def module_of(path: Path) -> str:
    base = ROOT / "cli" if "dcnseg_cli" in path.parts else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The row entry that a module belongs to: dcnseg.ops.deform_conv.reference -> dcnseg.ops."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dcnseg_cli" else ".".join(parts[:2])


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports; of dcnseg/__init__.py not those for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if path == ROOT / "dcnseg" / "__init__.py":
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(module_of(path))
    assert unit in ROW_OF, f"{unit} has no row; give it one"
    for other in {unit_of(target) for target in imports_of(path)} - {unit}:
        if other.split(".")[0] in ("dcnseg", "dcnseg_cli"):
            is_beside = ROW_OF[other] == ROW_OF[unit] == 0
            assert ROW_OF[other] < ROW_OF[unit] or is_beside, f"{path} imports {other}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if unit_of(module_of(path)) in ROWS_WITHIN], ids=module_of
)
def test_imports_within_a_package_point_down(path: Path) -> None:
    own, *others = (".".join(m.split(".")[:3]) for m in (module_of(path), *imports_of(path)))
    package = unit_of(own)
    for other in {other for other in others if other.startswith(f"{package}.")} - {own}:
        row, other_row = ROW_WITHIN.get(own, 0), ROW_WITHIN.get(other, 0)
        assert other_row < row or row == other_row == 0, f"{path} imports {other}"


def test_packages_with_rows_exist() -> None:
    modules = {".".join(module_of(path).split(".")[:3]) for path in FILES}
    assert set(ROW_WITHIN) <= modules


@pytest.mark.parametrize("unit", NO_TORCH)
def test_bottom_row_is_free_of_torch(unit: str) -> None:
    path = ROOT / f"{unit.replace('.', '/')}.py"
    path = path if path.is_file() else ROOT / unit / "__init__.py"
    assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "cv2", "numpy"}


def test_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys, dcnseg_cli.main\n"
        "heavy = {'torch', 'torchvision', 'segmentation_models_pytorch', 'cv2', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
