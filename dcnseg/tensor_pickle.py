"""Allow-list reader of the pickles in `torch.save` files; entry point `read_pickle`.

A pickle is a program. A few hundred bytes can exhaust the memory (`bytearray(3e9)`) or the time
(hashing a tuple that holds itself twice, nested sixty times). Only the opcodes, types and functions
that state dicts need are implemented here; all others are refused. The number of opcodes is
limited, and each takes constant time and memory, or time and memory proportional to the bytes that
it reads.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import IO, Any, Final

import torch
from torch import Tensor

MAX_INSTRUCTIONS: Final = 1_000_000  # a tensor takes about 40; each allocates at most 64 bytes
MAX_VALUES: Final = 1_000_000  # in the result; a shared container counts each time
MAX_DEPTH: Final = 32
MAX_DIMENSIONS: Final = 8
MAX_SHARING: Final = 8  # total bytes of the tensors / total bytes of the storages
# Larger integers can be chosen with equal hashes, which makes dictionaries quadratic.
MAX_KEY: Final = 2**31 - 1

MakeStorage = Callable[[str, torch.dtype, int], Tensor]
"""Returns a one-dimensional tensor for a storage, given its key, dtype and number of elements."""

_STORAGE_DTYPES: Final = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
DTYPES: Final = frozenset(_STORAGE_DTYPES.values())


def read_pickle(stream: IO[bytes], make_storage: MakeStorage | None = None) -> Any:
    """Read one pickle from the current position of a stream, and leave the stream after it.

    `make_storage` loads the storages of tensors; if it is None, tensors are refused.

    Returns:
        Tensors, numbers, strings, None, and lists, tuples and dictionaries of them.

    Raises:
        ValueError: The pickle is damaged, has values of other types, or exceeds a limit.
    """
    machine = _PickleMachine(make_storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {count} opcodes")
            machine.run(opcode.name, argument)
    except (LookupError, TypeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    if len(machine.stack) != 1:
        raise ValueError(f"its pickle is damaged ({len(machine.stack)} results)")
    _check_result(machine.stack[0], MAX_SHARING * machine.storage_bytes)
    return machine.stack[0]


@dataclass(frozen=True)
class _Storage:
    """A storage on the stack; not allowed in a result."""

    values: Tensor  # [N]


class _PickleMachine:
    """The stack, marks and memo of a pickle while it is read."""

    def __init__(self, make_storage: MakeStorage | None) -> None:
        self.stack: list[Any] = []
        self.storage_bytes = 0
        self._values_left = MAX_VALUES
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, _Storage] = {}
        self._make_storage = make_storage

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self._memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self.stack.append(argument)
            case "MEMOIZE":
                self._memo[len(self._memo)] = self.stack[-1]
            case "BINUNICODE" | "SHORT_BINUNICODE" | "SHORT_BINSTRING":
                self.stack.append(_check_text(argument))
            case "MARK":
                self._marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._pop(int(name[-1]))))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                self.stack.append({"TUPLE": tuple, "LIST": list, "DICT": dict}[name[6:]]())
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "GLOBAL":
                self.stack.append(_resolve_global(argument))
            case "STACK_GLOBAL":
                module, kind = self._pop(2)
                self.stack.append(_resolve_global(f"{module} {kind}"))
            case "BINPERSID":
                self.stack.append(self._resolve_storage(*self._pop(1)))
            case "REDUCE":
                self.stack.append(self._call(*self._pop(2)))
            case "BUILD":  # attributes of an OrderedDict, such as the versions of a state dict
                self._pop(1)
                self._top(dict)
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(f"its pickle has the opcode {name}, which state dicts do not use")

    def _pop(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("its pickle is damaged (empty stack)")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(
                f"its pickle is damaged (expected {kind.__name__}, found "
                f"{type(self.stack[-1]).__name__})"
            )
        return self.stack[-1]

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("its pickle is damaged (a key without a value)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_check_key(key)] = value

    def _resolve_storage(self, persistent_id: Any) -> _Storage:
        """Resolve a persistent ID ("storage", dtype, key, device, numel[, view])."""
        kind, dtype, key, _device, numel, *views = persistent_id
        is_valid = kind == "storage" and type(key) is str and type(numel) is int and numel >= 0
        if not is_valid or self._make_storage is None or views not in ([], [None]):
            raise ValueError("the persistent ID of a storage is damaged")
        if type(dtype) is not torch.dtype:
            raise ValueError(f"the storage {key!r} has no dtype")
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = _Storage(self._make_storage(key, dtype, numel))
            self.storage_bytes += storage.values.nbytes
        if storage.values.dtype != dtype or len(storage.values) != numel:
            raise ValueError(f"the storage {key!r} has two different dtypes or sizes")
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not FunctionType or type(arguments) is not tuple:
            raise ValueError("its pickle is damaged (it calls an object that is not a function)")
        # A list can be an argument of many calls.
        self._values_left -= sum(len(a) for a in arguments if type(a) in (list, tuple, dict))
        if self._values_left < 0:
            raise ValueError(f"its pickle passes more than {MAX_VALUES} values to functions")
        return function(*arguments)


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has a string with an unpaired surrogate") from error
    return text


def _check_key(key: Any) -> str | int:
    if type(key) is str or (type(key) is int and 0 <= key <= MAX_KEY):
        return key
    raise ValueError(
        f"a dictionary has a key of type {type(key).__name__}; expected a string or an integer "
        f"from 0 to {MAX_KEY}"
    )


def _resolve_global(name: str) -> Any:
    """Return the dtype of a storage type, or a function of `_FUNCTIONS`."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    module, _, kind = name.partition(" ")
    if module == "torch" and kind.removesuffix("Storage") in _STORAGE_DTYPES:
        return _STORAGE_DTYPES[kind.removesuffix("Storage")]
    raise ValueError(
        f"it has {name.replace(' ', '.')}; expected only tensors, numbers, strings, lists and "
        "dictionaries. Save only the state dict: torch.save(model.state_dict(), path)"
    )


def _rebuild_dict(content: Any = ()) -> dict[str | int, Any]:
    pairs = content.items() if type(content) is dict else content
    return {_check_key(key): value for key, value in pairs}


def _rebuild_size(sides: Any) -> tuple[Any, ...]:
    if type(sides) is not tuple:
        raise ValueError("the size of a tensor is not a tuple")
    return sides


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_flags: Any) -> Tensor:
    """Return a view of a storage; refuse elements outside of it and views larger than it."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor has damaged arguments")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("the offset, size and stride of a tensor are not all integers >= 0")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError(
            f"a tensor has {len(size)} dimensions and {len(stride)} strides; expected the same "
            f"number, at most {MAX_DIMENSIONS}"
        )
    numel, end = 1, offset
    for side, step in zip(size, stride, strict=True):
        numel *= side
        end += (side - 1) * step
    if numel and (numel > len(storage.values) or end >= len(storage.values)):
        raise ValueError(
            f"a tensor of size {list(size)} does not fit its storage of {len(storage.values)} "
            "elements"
        )
    values = storage.values
    return values.as_strided(size, stride, offset) if numel else values.new_empty(size)


def _rebuild_parameter(data: Any, *_flags: Any) -> Tensor:
    if type(data) is not Tensor:
        raise ValueError("a parameter is not a tensor")
    return data


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "collections OrderedDict": _rebuild_dict,
    "collections Counter": _rebuild_dict,
    "torch Size": _rebuild_size,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
}


def _check_result(result: Any, max_bytes: int) -> None:
    """Check the nesting depth, the number of values, the shared bytes and the types."""
    values_left, bytes_left = MAX_VALUES, max_bytes
    pending = [(result, 0)]
    while pending:
        value, depth = pending.pop()
        if type(value) in (dict, list, tuple):
            values_left -= len(value)
            children = value.values() if type(value) is dict else value
            if values_left < 0 or depth == MAX_DEPTH:
                raise ValueError(
                    f"it has more than {MAX_VALUES} values or {MAX_DEPTH} levels of nesting"
                )
            pending.extend((child, depth + 1) for child in children)
        elif type(value) is Tensor:
            bytes_left -= value.nbytes
            if bytes_left < 0:
                raise ValueError(
                    f"its tensors take more than {MAX_SHARING} times the bytes of its storages"
                )
        elif not (value is None or type(value) in (bool, int, float, str)):
            raise ValueError(f"it has a value of type {type(value).__name__}")
