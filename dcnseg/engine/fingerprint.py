"""Whether the files of a data set are those that a run began with.

Entry points: `write_fingerprints` and `check_files_are_unchanged`.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dcnseg.data.pairing.splits import Splits
from dcnseg.data.sample import Sample
from dcnseg.errors import CheckpointError, DataError, short_repr
from dcnseg.files import atomic_path, read_json
from dcnseg.safe_load import summarize_error

FILES = "files.json"
PROBE_BYTES = 4096  # read at each end; in a PNG the last bytes hold a checksum of all pixels

Fingerprint = list[int]  # size in bytes and checksum of both ends


def write_fingerprints(run: Path, splits: Splits) -> None:
    """Write what the run's images and masks look like to files.json."""
    with atomic_path(run / FILES) as temporary:
        temporary.write_text(json.dumps(_fingerprints(splits)), encoding="utf-8")


def check_files_are_unchanged(run: Path, splits: Splits) -> None:
    """Compare the files of the same splits with what files.json says.

    Raises:
        DataError: an image or mask is another one than when the run began.
        CheckpointError: files.json is damaged.
    """
    path = run / FILES
    if not path.is_file():
        return  # the run was begun before there was such a file
    try:
        before = _parse(read_json(path, has_file_names=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error
    samples, now = _samples(splits), _fingerprints(splits)
    if missing := sorted(set(now) - set(before)):
        raise CheckpointError(f"{path} is damaged: it lacks {missing[0]}")
    changed = [
        (samples[key], kind, before[key][kind], fingerprint)
        for key, kinds in now.items()
        for kind, fingerprint in kinds.items()
        if before[key][kind] != fingerprint
    ]
    if changed:
        sample, kind, old, new = changed[0]
        file = sample.image if kind == "image" else sample.mask
        how = f"{old[0]} bytes then, {new[0]} now" if old[0] != new[0] else "other content"
        raise DataError(
            f"{file}: has changed since the run began ({how}), as have {len(changed) - 1} other "
            "files. Put them back, or start a new run."
        )


def _parse(content: Any) -> dict[str, dict[str, Fingerprint]]:
    """The content of files.json, checked; a ValueError says what is wrong."""
    if not isinstance(content, dict):
        raise ValueError(f"it is {short_repr(content)}; expected a JSON object")
    for name, entry in content.items():
        kinds = entry if isinstance(entry, dict) else {}
        for kind in ("image", "mask"):
            numbers = kinds.get(kind)
            if not _is_fingerprint(numbers):
                raise ValueError(
                    f"the {kind} of {short_repr(name)} is {short_repr(numbers)}; expected its "
                    "size and checksum"
                )
    return content


def _is_fingerprint(numbers: Any) -> bool:
    is_pair = isinstance(numbers, list) and len(numbers) == 2
    return is_pair and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _samples(splits: Splits) -> dict[str, Sample]:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {f"{name}/{sample.stem}": sample for name, part in parts.items() for sample in part}


def _fingerprints(splits: Splits) -> dict[str, dict[str, Fingerprint]]:
    samples = _samples(splits)
    with ThreadPoolExecutor() as pool:
        images = pool.map(_fingerprint, [sample.image for sample in samples.values()])
        masks = pool.map(_fingerprint, [sample.mask for sample in samples.values()])
        return {
            key: {"image": image, "mask": mask}
            for key, image, mask in zip(samples, images, masks, strict=True)
        }


def _fingerprint(path: Path) -> Fingerprint:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            checksum = zlib.crc32(file.read(PROBE_BYTES))
            file.seek(max(0, size - PROBE_BYTES))
            return [size, zlib.crc32(file.read(), checksum)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
