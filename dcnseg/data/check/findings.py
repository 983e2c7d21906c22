"""Errors and warnings of a check: `Finding`, and how they are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcnseg.errors import DataError

ERROR: Final = "error"
WARNING: Final = "warning"
_SHOWN_PER_KIND: Final = 10


@dataclass(frozen=True)
class Finding:
    """An error or a warning."""

    severity: str  # "error" (training refuses the data) or "warning"
    kind: str  # a short name for programs, such as "size-mismatch"
    file: str  # the file or folder
    what: str  # the problem, with the value or size that was found
    advice: str = ""  # what to do
    files: tuple[str, ...] = ()  # all files, if the finding is about a group

    def __str__(self) -> str:
        return f"{self.file}: {self.what} {self.advice}".rstrip()


def from_error(kind: str, path: Path, error: Exception, advice: str = "") -> Finding:
    """Convert an exception, whose text usually begins with the file name, into an error."""
    text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
    return Finding(ERROR, kind, str(path), text, advice)


def by_severity(findings: Sequence[Finding], severity: str) -> list[Finding]:
    """Return the findings of one severity."""
    return [finding for finding in findings if finding.severity == severity]


def format_findings(findings: Sequence[Finding], limit: int = _SHOWN_PER_KIND) -> list[str]:
    """Return the findings as lines: the first `limit` of each kind, and the number of others."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, group in kinds.items():
        lines += [str(finding) for finding in group[:limit]]
        if len(group) > limit:
            lines.append(f"... and {len(group) - limit} more of this kind ({kind})")
    return lines


def raise_errors(findings: Sequence[Finding]) -> None:
    """Raise a DataError that lists all errors, if there are any."""
    errors = by_severity(findings, ERROR)
    if len(errors) == 1:
        raise DataError(str(errors[0]))
    if errors:
        lines = "\n".join(f"  {line}" for line in format_findings(errors))
        raise DataError(f"Found {len(errors)} problems in the dataset:\n{lines}")
