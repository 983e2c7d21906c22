"""Damaged and hostile weights files: each loads or raises one CheckpointError that names the file.

A file takes one to three milliseconds.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import re
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


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file of each supported format."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {"safetensors": folder / "w.safetensors"}
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
    for kind in ("zip", "legacy"):
        paths[kind] = folder / f"{kind}.pth"
        torch.save(state, paths[kind], _use_new_zipfile_serialization=kind == "zip")
    return paths


def outcome(path: Path, content: bytes) -> str:
    """Read a content: "read" or the message; any exception but CheckpointError fails the test."""
    path.write_bytes(content)
    try:
        load_tensors(path)
        if path.suffix == ".safetensors":
            read_weights_info(path)
        return "read"
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    return message


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
    for length in (*range(0, len(content), step), len(content) - 1):
        assert outcome(path, content[:length]) != "read"


@pytest.mark.parametrize(("kind", "count"), [("safetensors", 2000), ("zip", 2000), ("legacy", 500)])
def test_flipped_bytes(originals: dict[str, Path], tmp_path: Path, kind: str, count: int) -> None:
    content = originals[kind].read_bytes()
    path = tmp_path / originals[kind].name
    is_read = {outcome(path, changed) == "read" for changed in flips(content, count)}
    assert is_read == {True, False}


def test_flipped_bit_of_a_zipped_tensor_is_refused(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    content = bytearray(originals["zip"].read_bytes())
    content[content.index(TENSORS["a"].numpy().tobytes()) + 7] ^= 1
    message = outcome(tmp_path / "x.pth", bytes(content))
    assert re.search(r"the checksum of its entry .*/data/0 does not match", message)


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
    assert outcome(tmp_path / "x.safetensors", content) != "read"


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
    message = outcome(path, bomb)
    assert re.search(r"entries declare 671\d+ bytes in a file of \d{5} bytes, ", message)
    assert outcome(path, repacked(content, lambda _, data: data, zipfile.ZIP_STORED)) == "read"


def test_long_pickle_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    bomb = with_pickle(originals["zip"], b"\x80\x02" + b"]" * MAX_HEADER_BYTES)
    assert outcome(tmp_path / "x.pth", bomb) != "read"


def with_pickle(original: Path, pickled: bytes) -> bytes:
    """The zip file with another pickle."""

    def change(name: str, data: bytes) -> bytes:
        return pickled if name.endswith(".pkl") else data

    return repacked(original.read_bytes(), change, zipfile.ZIP_STORED)


def test_storage_longer_than_its_data_is_refused(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    """In the older format; test_tensor_pickle has zip files."""
    claim = b"K\x0cNt"  # 12 elements, the end of the persistent ID
    content = originals["legacy"].read_bytes()
    assert claim in content
    longer = content.replace(claim, b"J\xff\xff\xff\x7fNt")
    assert outcome(tmp_path / "x.pth", longer) != "read"


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
    assert outcome(tmp_path / "x.pth", pickled) != "read"
    message = outcome(tmp_path / "y.pth", with_pickle(originals["zip"], pickled))
    assert (message == "read") == (pickled in HARMLESS)


class Sly:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_is_executed(is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Sly()}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    text = r"x\.pth cannot be read .* it has .*; expected only tensors"
    with pytest.raises(CheckpointError, match=text):
        load_tensors(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()
