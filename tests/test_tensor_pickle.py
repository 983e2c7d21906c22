from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from dcnseg.safe_load import load_tensors
from dcnseg.tensor_pickle import read_pickle
from dcnseg.torch_file import MAX_HEADER_BYTES

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every dtype and 0 to 4 dimensions, some transposed or sliced."""
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    kind = draw(st.sampled_from(("plain", "transposed", "a part", "a parameter")))
    tensor = torch.randint(0, 2, shape, dtype=draw(st.sampled_from(DTYPES)))
    if kind == "transposed" and shape:
        return tensor.transpose(0, -1)
    if kind == "a part" and shape:
        return tensor[1:]
    is_parameter = kind == "a parameter" and tensor.is_floating_point()
    return nn.Parameter(tensor) if is_parameter else tensor


KEYS = st.text("abc.é", max_size=4) | st.integers(0, 2**31 - 1)
NUMBERS = st.floats(allow_nan=False) | st.integers(-(2**70), 2**70)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=300)
STATES = st.recursive(
    PLAIN | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(st.integers(0, 99), st.integers(1, 9), max_size=4).map(Counter)
        | st.lists(st.integers(0, 9), max_size=4).map(torch.Size)
    ),
    max_leaves=12,
)


def is_same(a: Any, b: Any) -> bool:
    """Whether two states are equal; an OrderedDict is loaded as dict, a torch.Size as tuple."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        is_equal = isinstance(b, tuple if isinstance(a, tuple) else list) and len(a) == len(b)
        return is_equal and all(map(is_same, a, b))
    return type(a) is type(b) and a == b


@given(state=STATES, is_zip=st.booleans(), protocol=st.integers(2, 5))
def test_round_trip(state: Any, is_zip: bool, protocol: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "state.pth"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    assert is_same(state, load_tensors(path))


def test_safetensors_header_that_starts_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for padding in range(700):
        save_file({"a": torch.ones(2)}, path, metadata={"text": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of 640 bytes")
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))


@pytest.mark.parametrize("is_zip", [True, False])
def test_shared_tensors_stay_shared(is_zip: bool, tmp_path: Path) -> None:
    weight = torch.randn(5)
    tied = [weight, weight, weight[2:]]
    torch.save(tied, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    content = load_tensors(tmp_path / "x.pth")
    assert is_same(tied, content)
    assert content[0].data_ptr() == content[1].data_ptr() == content[2].data_ptr() - 8


def test_files_of_python_2_are_read() -> None:
    """The first torchvision files have byte strings, and lists for ordered dictionaries."""
    text = b"ccollections\nOrderedDict\nq\x00]q\x01]q\x02(U\x06conv1.q\x03K\x01ea\x85Rq\x05."
    assert read_pickle(io.BytesIO(b"\x80\x02" + text)) == {"conv1.": 1}


def storage(key: bytes = b"0", numel: int = 1) -> bytes:
    """Opcodes that push a float storage."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
        + struct.pack("<I", len(key))
        + key
        + b"X\x03\x00\x00\x00cpuJ"
        + struct.pack("<i", numel)
        + b"tQ"
    )


def tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    """Opcodes that push a tensor of the storage in memo 9."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(h\x09"
        + (offset + size + stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


ONE = storage() + b"q\x09"
MILLION = b"J\x40\x42\x0f\x00"
TWICE = b"K\x01\x85" + b"q\x01h\x01\x86" * 60  # a tuple that holds itself twice, nested 60 times
PAIRS = b"](X\x01\x00\x00\x00aK\x01\x86q\x01" + b"h\x01" * 100_000 + b"e\x85q\x03"
MANY = "more than 1000000"
# Pickles of a file with a storage of one float, and the reason why each is refused.
HOSTILE = {
    "a reservation": (
        b"c__builtin__\nbytearray\n\x8a\x05\x00\x5e\xd0\xb2\x00\x85R",
        "it has __builtin__.bytearray; expected only tensors",
    ),
    "a hash without end": (
        b"}" + TWICE + b"Ns",
        "a key of type tuple; expected a string or an int",
    ),
    "a value without end": (TWICE, MANY),
    "a list in itself": (b"]q\x01h\x01a", "or 32 levels of nesting"),
    "nested lists": (b"]" * 90_000 + b"a" * 89_999, "or 32 levels of nesting"),
    "nested tuples": (b"N" + b"\x85" * 90_000, "or 32 levels of nesting"),
    "many sets": (b"(" + b"\x8f" * 3_000_000 + b"t", "opcode EMPTY_SET, which state dicts do not"),
    "many dictionaries": (b"(" + b"}" * 3_000_000 + b"t", f"{MANY} opcodes"),
    "many copies": (
        b"ccollections\nOrderedDict\nq\x02" + PAIRS + b"R(" + b"h\x02h\x03R" * 90_000 + b"t",
        f"passes {MANY} values to functions",
    ),
    "keys of one hash": (b"}\x8a\x08" + b"\xff" * 7 + b"\x1fNs", "a key of type int"),
    "a key of another type": (b"}NNs", "a key of type NoneType"),
    "a million million": (
        ONE + tensor(b"K\x00", MILLION + MILLION + b"\x86", b"K\x00K\x00\x86"),
        r"size \[1000000, 1000000\] does not fit its storage of 1 elements",
    ),
    "two of one": (ONE + tensor(b"K\x00", b"K\x02\x85", b"K\x00\x85"), "does not fit its storage"),
    "behind the end": (ONE + tensor(b"K\x01", b")", b")"), "does not fit its storage"),
    "stride": (ONE + tensor(b"K\x00", b"K\x02\x85", MILLION + b"\x85"), "does not fit its storage"),
    "backwards": (
        ONE + tensor(b"K\x00", b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),
        "size and stride of a tensor are not all integers >= 0",
    ),
    "nine dimensions": (
        ONE + tensor(b"K\x00", b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"),
        "has 9 dimensions and 9 strides; expected the same number, at most 8",
    ),
    "one stride": (ONE + tensor(b"K\x00", b"K\x01K\x01\x86", b"K\x01\x85"), "and 1 strides"),
    "no storage": (
        tensor(b"K\x00", b")", b")").replace(b"h\x09", b"N"),
        "tensor has damaged arguments",
    ),
    "two sizes": (b"(" + storage() + storage(numel=2) + b"t", "has two different dtypes or sizes"),
    "greedy": (storage(numel=2**31 - 1), "storage 0 declares 8589934588 bytes but has 4"),
    "not there": (storage(b"1"), "storage 1 declares 4 bytes but has 0"),
    "a storage": (storage(), "it has a value of type _Storage"),
    "a type": (b"ctorch\nFloatStorage\n", "it has a value of type dtype"),
    "a function": (b"ctorch._utils\n_rebuild_tensor_v2\n", "it has a value of type function"),
    "a called number": (b"K\x01)R", "calls an object that is not a function"),
    "no arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "damaged"),
    "a parameter": (
        b"ctorch._utils\n_rebuild_parameter\nK\x01\x85R",
        "a parameter is not a tensor",
    ),
    "a size": (b"ctorch\nSize\nK\x01\x85R", "size of a tensor is not a tuple"),
    "attributes": (b"K\x01}b", "expected dict, found int"),
    "entries": (b"K\x01K\x02a", "expected list, found int"),
    "a surrogate": (b"X\x03\x00\x00\x00\xed\xa0\x80", "unpaired surrogate"),
    "an unknown memo": (b"h\x07", "damaged"),
    "nothing": (b"", "damaged"),
    "two things": (b"NN", "damaged"),
    "an odd dictionary": (b"}(K\x01u", "damaged"),
    "no marks": (b"t", "damaged"),
    "below a mark": (b"N(\x85", "damaged"),
    "quantized": (b"ctorch._utils\n_rebuild_qtensor\n)R", "it has torch._utils._rebuild_qtens"),
    "sparse": (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "it has torch._utils._rebuild_spa"),
    "complex": (b"ctorch\nComplexFloatStorage\n", "it has torch.ComplexFloatStorage"),
}


def packed(description: bytes, entries: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in {"a/data.pkl": description, **entries}.items():
            archive.writestr(name, content)
    return target.getvalue()


def shared_tensors() -> bytes:
    """A storage of 1 MB that 1000 tensors share; copies of them would take 1 GB."""
    numel = 2**18
    one = tensor(b"K\x00", b"J" + struct.pack("<i", numel) + b"\x85", b"K\x01\x85")
    description = b"\x80\x02(" + storage(numel=numel) + b"q\x09" + one + b"q\x08"
    return packed(description + b"h\x08" * 1000 + b"t.", {"a/data/0": b"\0" * numel * 4})


READ_ALL = """
import json, sys
from pathlib import Path
from dcnseg.errors import CheckpointError
from dcnseg.safe_load import load_tensors

def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])

outcomes = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = memory("VmRSS")
    try:
        load_tensors(path)
        message = "read"
    except CheckpointError as error:
        message = str(error)
    outcomes[path.name] = message, memory("VmHWM") - before
print(json.dumps(outcomes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_are_refused_without_large_allocations(tmp_path: Path) -> None:
    reasons = {name: reason for name, (_, reason) in HOSTILE.items()}
    for name, (description, _) in HOSTILE.items():
        content = packed(b"\x80\x02" + description + b".", {"a/data/0": b"\0\0\0\0"})
        (tmp_path / name).write_bytes(content)
    reasons["shared tensors"] = "its tensors take more than 8 times the bytes of its storages"
    (tmp_path / "shared tensors").write_bytes(shared_tensors())
    reasons["a long directory"] = f"its zip directory has .* at most {MAX_HEADER_BYTES}"
    entries = {f"a/{'x' * 1000}{i}": b"" for i in range(4000)}
    (tmp_path / "a long directory").write_bytes(packed(b"\x80\x02N.", entries))
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    outcomes = json.loads(result.stdout)
    for name, reason in reasons.items():
        message, kilobytes = outcomes[name]
        assert re.search(f"^{tmp_path / name} cannot be read .*: .*{reason}", message), message
        assert len(message.splitlines()) == 1
        assert len(message) < 1000
        assert kilobytes < 128_000, name


FRAGMENTS = [
    *(b"N", b"\x88", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x02\x01\x02", b"X\x01\x00\x00\x00a"),
    *(b"(", b"t", b"\x85", b"\x86", b"\x87", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"R", b"b"),
    *(b"Q", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"ctorch\nFloatStorage\n", b"0", b"2", b"\x8f"),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", storage(), ONE, tensor(b"K\x00", b")", b")"), b"."),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join))
@settings(max_examples=400)
def test_any_sequence_of_opcodes_is_a_value_or_an_error(pickled: bytes) -> None:
    with suppress(ValueError):
        read_pickle(io.BytesIO(b"\x80\x02" + pickled + b"."), lambda *_: torch.zeros(1))
