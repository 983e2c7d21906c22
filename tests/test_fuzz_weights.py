"""Damaged and hostile weights files: each loads or raises one CheckpointError that names the file.

A file takes one to three milliseconds.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg.checkpoint import TrainingDataStats, read_weights_info, save_weights
from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.errors import CheckpointError
from dcnseg.safe_load import load_tensors
from dcnseg.torch_file import MAX_HEADER_BYTES

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(4), "c": torch.ones(2).half()}
KINDS = ("safetensors", "zip", "legacy")


def read_all(path: Path) -> None:
    load_tensors(path)
    if path.suffix == ".safetensors":
        read_weights_info(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file of each supported format."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {
        "safetensors": folder / "w.safetensors",
        "zip": folder / "zip.pth",
        "legacy": folder / "legacy.pth",
    }
    save_weights(
        paths["safetensors"],
        TENSORS,
        model=ModelConfig(),
        class_map=ClassMap((ClassInfo(3, "road", (1, 2, 3)), ClassInfo(7, "tree", (4, 5, 6)))),
        preprocessing=Preprocessing(),
        scores={"mean_iou": 0.5},
        training_data=TrainingDataStats(3, (10, 20), (30, 40), 0.5),
    )
    state = {"model": TENSORS, "epoch": 3, "random": [1, 2, (3, None)], "rate": 0.5}
    torch.save(state, paths["zip"])
    torch.save(state, paths["legacy"], _use_new_zipfile_serialization=False)
    return paths


def outcome(path: Path, content: bytes, read: Callable[[Path], object] = read_all) -> str:
    """Read a content: "read" or "refused"; any exception but a CheckpointError fails the test."""
    path.write_bytes(content)
    message = ""
    try:
        read(path)
    except CheckpointError as error:
        message = str(error)
    if not message:
        return "read"
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return "refused"


def flips(content: bytes, count: int) -> Iterator[bytes]:
    choose = random.Random(7)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(choose.choice((1, 1, 1, 3, 20))):
            changed[choose.randrange(len(changed))] ^= choose.randrange(1, 256)
        yield bytes(changed)


@pytest.mark.parametrize(("kind", "step"), [("safetensors", 1), ("zip", 7), ("legacy", 3)])
def test_file_truncated_at_any_length_is_refused(
    originals: dict[str, Path], tmp_path: Path, kind: str, step: int
) -> None:
    content = originals[kind].read_bytes()
    path = tmp_path / originals[kind].name
    assert outcome(path, content) == "read"
    lengths = [*range(0, len(content), step), len(content) - 1]
    assert {outcome(path, content[:length]) for length in lengths} == {"refused"}


@pytest.mark.parametrize(("kind", "count"), [("safetensors", 2000), ("zip", 2000), ("legacy", 500)])
def test_flipped_bytes(originals: dict[str, Path], tmp_path: Path, kind: str, count: int) -> None:
    content = originals[kind].read_bytes()
    path = tmp_path / originals[kind].name
    assert {outcome(path, changed) for changed in flips(content, count)} == {"read", "refused"}


def test_flipped_bit_of_a_zipped_tensor_is_refused(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray(originals["zip"].read_bytes())
    content[content.index(TENSORS["a"].numpy().tobytes()) + 7] ^= 1
    path = tmp_path / "x.pth"
    assert outcome(path, bytes(content)) == "refused"
    with pytest.raises(
        CheckpointError, match=r"the checksum of its entry .*/data/0 does not match"
    ):
        load_tensors(path)


def safetensors_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_of({}, length=2**63),
        safetensors_of({}, length=2**64 - 1),
        safetensors_of({}, length=2**40),
        safetensors_of(b" " * (MAX_HEADER_BYTES + 1)),
        safetensors_of(described([2**20, 2**20], 2**42), b"\0" * 64),
        safetensors_of(described([2**32, 2**32], 64), b"\0" * 64),
        safetensors_of(described([2**63], 64), b"\0" * 64),
        safetensors_of(described([-4], 16), b"\0" * 16),
        safetensors_of(described([4], 8), b"\0" * 16),
        safetensors_of(described([4], 16, "F99"), b"\0" * 16),
        safetensors_of(b"[" * 100_000 + b"]" * 100_000),
        safetensors_of({"__metadata__": {"dcnseg": "[" * 100_000}}),
    ],
)
def test_safetensors_header_with_excessive_sizes_is_refused(content: bytes, tmp_path: Path) -> None:
    assert outcome(tmp_path / "x.safetensors", content) == "refused"


def repacked(content: bytes, change: Callable[[str, bytes], bytes], method: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target.getvalue()


def test_zip_bomb_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    content = originals["zip"].read_bytes()

    def swollen(name: str, data: bytes) -> bytes:
        return data + b"\0" * 2**26 if name.endswith("data/0") else data

    bomb = repacked(content, swollen, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    path = tmp_path / "bomb.pth"
    assert outcome(path, bomb) == "refused"
    with pytest.raises(
        CheckpointError, match=r"entries declare 671\d+ bytes in a file of \d{5} bytes, "
    ):
        load_tensors(path)
    assert outcome(path, repacked(content, lambda _, data: data, zipfile.ZIP_STORED)) == "read"


def test_long_pickle_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    def swollen(name: str, data: bytes) -> bytes:
        return b"\x80\x02" + b"]" * MAX_HEADER_BYTES if name.endswith(".pkl") else data

    bomb = repacked(originals["zip"].read_bytes(), swollen, zipfile.ZIP_STORED)
    assert outcome(tmp_path / "x.pth", bomb) == "refused"


def test_storage_longer_than_its_data_is_refused(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    claim = b"K\x0ct"  # 12 elements, the end of the persistent ID

    def greedy(name: str, data: bytes) -> bytes:
        assert not name.endswith(".pkl") or claim in data
        return data.replace(claim, b"J\xff\xff\xff\x7ft") if name.endswith(".pkl") else data

    path = tmp_path / "x.pth"
    assert outcome(path, repacked(originals["zip"].read_bytes(), greedy, 0)) == "refused"
    with pytest.raises(CheckpointError, match=r"storage 0 declares 8589934588 bytes but has 48\."):
        load_tensors(path)
    content = originals["legacy"].read_bytes()
    claim = b"K\x0cNt"
    assert claim in content
    assert outcome(path, content.replace(claim, b"J\xff\xff\xff\x7fNt")) == "refused"


# Any memo index is allowed, and so are values other than tensors.
HARMLESS = (b"\x80\x02]r\xff\xff\xff\x7f.", pickle.dumps({"a": 1}, protocol=2))


@pytest.mark.parametrize(
    "pickled",
    [
        *HARMLESS,
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # an array of a terabyte
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of two gigabytes
        b"\x80\x02(((((((((.",
    ],
)
def test_hostile_pickle_is_refused(
    pickled: bytes, originals: dict[str, Path], tmp_path: Path
) -> None:
    assert outcome(tmp_path / "x.pth", pickled) == "refused"
    content = originals["zip"].read_bytes()
    packed = repacked(
        content, lambda name, data: pickled if name.endswith(".pkl") else data, zipfile.ZIP_STORED
    )
    expected = "read" if pickled in HARMLESS else "refused"
    assert outcome(tmp_path / "y.pth", packed) == expected


class Sly:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_is_executed(is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Sly()}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        CheckpointError, match=r"x\.pth cannot be read .* it has .*; expected only tensors"
    ):
        load_tensors(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()
