"""What the tests of data folders share: empty files, samples, and the findings of a check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcnseg.config import PairSource
from dcnseg.data.check.report import CheckReport, check_data
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.data.sample import Sample


def touch(root: Path, *names: str) -> None:
    """Create empty files, and their folders."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def samples_of(root: Path) -> tuple[Sample, ...]:
    """Return all samples of a folder in the order of their stems."""
    return find_splits(root, val_fraction=0).all_samples()


def by_split(root: Path, source: PairSource | None = None) -> dict[str, list[Sample]]:
    """Return the samples of each split, without drawing a val split."""
    splits = find_splits(root, source, val_fraction=0)
    parts = {name: list(getattr(splits, name)) for name in ("train", "val", "test")}
    return {name: samples for name, samples in parts.items() if samples}


def check(root: Path, **options: Any) -> CheckReport:
    """Check a folder as `dcnseg check` does."""
    return check_data(root, find_pairs(root), **options)


def errors(report: CheckReport) -> list[str]:
    """Return the kinds of all errors."""
    return [finding.kind for finding in report.findings if finding.severity == "error"]
