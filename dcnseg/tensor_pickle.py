"""Reading the pickles of `torch.save` by an allow-list; the entry point is `read_pickle`.

A pickle is a program. Other unpicklers run it and look at the result; a few hundred bytes can then
take all memory (`bytearray(3e9)`) or all time (the hash of a tuple that holds itself twice, sixty
times over). Here only the instructions, types and functions that state dicts are made of exist;
anything else is refused by its name. Each step takes constant time and memory, or as much as the
bytes it reads, and their number is limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import IO, Any, Final

import torch
from torch import Tensor

MAX_INSTRUCTIONS: Final = 1_000_000  # a tensor takes about 40, and one makes at most 64 bytes
MAX_VALUES: Final = 1_000_000  # of the result, those of a shared container counted each time
MAX_DEPTH: Final = 32
MAX_DIMENSIONS: Final = 8
MAX_SHARING: Final = 8  # bytes of all tensors over bytes of all storages
# Greater numbers could have one hash, and a dictionary of those takes quadratic time.
MAX_KEY: Final = 2**31 - 1

MakeStorage = Callable[[str, torch.dtype, int], Tensor]
"""Makes the one-dimensional tensor of a storage from its key, type and number of elements."""

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
    """Read the pickle that begins where the stream is, and leave the stream at its end.

    Args:
        stream: What holds the pickle.
        make_storage: Gives the storages that tensors lie in; None: there are no tensors.

    Returns:
        Tensors, numbers, text, None, and lists, tuples and dictionaries of them.

    Raises:
        ValueError: The pickle is damaged, or holds something else, or too much.
    """
    machine = _Machine(make_storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"its description has more than {count} instructions")
            machine.run(opcode.name, argument)
    except (LookupError, TypeError) as error:
        raise ValueError(f"its description is damaged ({type(error).__name__})") from error
    if len(machine.stack) != 1:
        raise ValueError(f"its description is damaged (it has {len(machine.stack)} results)")
    _check_result(machine.stack[0], MAX_SHARING * machine.storage_bytes)
    return machine.stack[0]


@dataclass(frozen=True)
class _Storage:
    """A storage on the stack; it is no value that a result may hold."""

    values: Tensor  # [N]


class _Machine:
    """The stack, its marks, and the memo of a pickle that is being read."""

    def __init__(self, make_storage: MakeStorage | None) -> None:
        self.stack: list[Any] = []
        self.storage_bytes = 0
        self._values_left = MAX_VALUES
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, _Storage] = {}
        self._make_storage = make_storage

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction."""
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
                self.stack.append(_text(argument))
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
                self.stack.append(_named(argument))
            case "STACK_GLOBAL":
                module, kind = self._pop(2)
                self.stack.append(_named(f"{module} {kind}"))
            case "BINPERSID":
                self.stack.append(self._storage(*self._pop(1)))
            case "REDUCE":
                self.stack.append(self._call(*self._pop(2)))
            case "BUILD":  # attributes of an OrderedDict, such as the versions of a state dict
                self._pop(1)
                self._last(dict)
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(
                    f"its description has the instruction {name}, which no state dict needs"
                )

    def _pop(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("its description is damaged (its stack is empty)")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _last(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(
                f"its description is damaged (a {type(self.stack[-1]).__name__} is used as a "
                f"{kind.__name__})"
            )
        return self.stack[-1]

    def _extend(self, items: list[Any]) -> None:
        self._last(list).extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._last(dict)
        if len(items) % 2:
            raise ValueError("its description is damaged (a key has no value)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _storage(self, description: Any) -> _Storage:
        """The storage that a description ("storage", type, key, device, size[, view]) means."""
        kind, dtype, key, _device, numel, *views = description
        is_valid = kind == "storage" and type(key) is str and type(numel) is int and numel >= 0
        if not is_valid or self._make_storage is None or views not in ([], [None]):
            raise ValueError("the description of a storage is damaged")
        if type(dtype) is not torch.dtype:
            raise ValueError(f"the storage {key!r} has no type")
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = _Storage(self._make_storage(key, dtype, numel))
            self.storage_bytes += storage.values.nbytes
        if storage.values.dtype != dtype or len(storage.values) != numel:
            raise ValueError(f"the storage {key!r} is described in two ways")
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not FunctionType or type(arguments) is not tuple:
            raise ValueError("its description is damaged (it calls what is no function)")
        # One list can be handed to many calls.
        self._values_left -= sum(len(a) for a in arguments if type(a) in (list, tuple, dict))
        if self._values_left < 0:
            raise ValueError(f"its description hands more than {MAX_VALUES} values to functions")
        return function(*arguments)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has a string with an unpaired surrogate") from error
    return text


def _checked_key(key: Any) -> str | int:
    if type(key) is str or (type(key) is int and 0 <= key <= MAX_KEY):
        return key
    raise ValueError(
        f"a dictionary in it has a {type(key).__name__} as a key; expected text, or a whole "
        f"number from 0 to {MAX_KEY}"
    )


def _named(name: str) -> Any:
    """What a pickle may name: the type of a storage, or a function of `_FUNCTIONS`."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    module, _, kind = name.partition(" ")
    if module == "torch" and kind.removesuffix("Storage") in _STORAGE_DTYPES:
        return _STORAGE_DTYPES[kind.removesuffix("Storage")]
    raise ValueError(
        f"it holds {name.replace(' ', '.')}; expected tensors, numbers, text, lists and "
        "dictionaries only. Save the state dict alone: torch.save(model.state_dict(), path)"
    )


def _dictionary(content: Any = ()) -> dict[str | int, Any]:
    pairs = content.items() if type(content) is dict else content
    return {_checked_key(key): value for key, value in pairs}


def _size(sides: Any) -> tuple[Any, ...]:
    if type(sides) is not tuple:
        raise ValueError("the size of a tensor is no tuple")
    return sides


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_flags: Any) -> Tensor:
    """A view of a storage, without elements outside of it or several times in it."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("the description of a tensor is damaged")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("the offset, size and stride of a tensor are not all whole numbers")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError(
            f"a tensor has {len(size)} dimensions and {len(stride)} strides; expected as many, and "
            f"at most {MAX_DIMENSIONS}"
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
    return storage.values.as_strided(size, stride, offset) if numel else _empty(storage, size)


def _empty(storage: _Storage, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=storage.values.dtype)


def _parameter(data: Any, *_flags: Any) -> Tensor:
    if type(data) is not Tensor:
        raise ValueError("a parameter is no tensor")
    return data


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "collections OrderedDict": _dictionary,
    "collections Counter": _dictionary,
    "torch Size": _size,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}


def _check_result(result: Any, max_bytes: int) -> None:
    """Refuse what is nested too deep, shared too often, or neither a tensor nor plain."""
    values_left, bytes_left = MAX_VALUES, max_bytes
    pending = [(result, 0)]
    while pending:
        value, depth = pending.pop()
        if type(value) in (dict, list, tuple):
            values_left -= len(value)
            children = value.values() if type(value) is dict else value
            if values_left < 0 or depth == MAX_DEPTH:
                raise ValueError(
                    f"it holds more than {MAX_VALUES} values, or {MAX_DEPTH} inside each other"
                )
            pending.extend((child, depth + 1) for child in children)
        elif type(value) is Tensor:
            bytes_left -= value.nbytes
            if bytes_left < 0:
                raise ValueError(f"its tensors have more than {MAX_SHARING} times its bytes")
        elif not (value is None or type(value) in (bool, int, float, str)):
            raise ValueError(f"it holds a {type(value).__name__} by itself")
