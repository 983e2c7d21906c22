"""What is checked of the operators on a GPU, one function per check.

Entry point: `make_checks`. A check returns a summary line, or raises an AssertionError if it fails
and a SkipTest if it cannot run on this machine. Checks that need a GPU skip on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import gradient_like, relative_norm
from dcnseg.ops import native_status
from dcnseg.ops.backend import SelfTest
from dcnseg.ops.deform_conv import native as deform_conv_native
from dcnseg.ops.roi import native as roi_native
from tests.gpu.cases import BOXES, OperatorCase, as_leaves, make_cases, one_case_per_operator

TF32 = "tf32"
DTYPES = ("float64", "float32", TF32, "bfloat16", "float16")
QUICK_DTYPES = ("float64", "float32", "bfloat16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
MAX_ERROR_RATIO = 2.0  # of the native error to the reference's error in the same dtype

# Allowed where the reference is exact: a quarter of the distance between two numbers near 1.
_MIN_TOLERANCE = {
    "float64": 1e-14,
    "float32": 2.0**-25,
    TF32: 2.0**-12,
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
}

# PyTorch reads it once, at the first matrix product, and needs it for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Check:
    """A named check that runs on a device."""

    name: str
    run: Callable[[torch.device], str]

    def __str__(self) -> str:
        return self.name


def make_checks(*, quick: bool) -> Iterator[Check]:
    """Yield all checks that run in this process, the most informative first.

    With `quick`, there are fewer dtypes and cases, and only one operator is compiled.
    """
    yield Check("library is loaded", check_library)
    yield Check("self-tests", check_self_tests)
    for operator, group in groupby(make_cases(quick=quick), lambda case: case.operator):
        own = list(group)
        for dtype in QUICK_DTYPES if quick else DTYPES:
            if dtype != TF32 or operator == "deform_conv2d":  # the only one with a matrix product
                yield Check(f"{operator} {dtype}", partial(check_accuracy, cases=own, dtype=dtype))
    few = list(one_case_per_operator(quick=quick))
    compiled = few[:1] if quick else few
    for what, check, cases in (
        ("gradcheck", check_gradients, few),
        ("opcheck", check_registration, compiled),
        ("torch.compile", check_compiled, compiled),
        ("CUDA graph", check_graph, few),
    ):
        for case in cases:
            yield Check(f"{what} of {case}", partial(check, case=case))
    yield Check("stream of the caller", partial(check_stream, cases=few))
    yield Check("two threads", partial(check_threads, cases=few))
    yield Check("backward on another thread", partial(check_backward_thread, cases=few))
    yield Check("NaN and infinities", partial(check_not_finite, cases=few))
    yield Check("deterministic algorithms", partial(check_deterministic, cases=few))


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise SkipTest("needs a GPU")


def check_library(device: torch.device) -> str:
    state = native_status()[device.type]
    assert state == "loaded", state
    return native_status()["build"]


def check_self_tests(device: torch.device) -> str:
    tests: dict[str, SelfTest] = {
        "deform_conv2d": deform_conv_native.cuda_self_test,
        "roi_pool": roi_native.roi_pool_self_test,
        "roi_avg_pool": roi_native.roi_avg_pool_self_test,
        "deform_roi_pool": roi_native.deform_roi_pool_self_test,
    }
    for name, test in tests.items():
        reason = test(device)
        assert reason is None, f"{name} {reason}"
    return ", ".join(tests)


def check_accuracy(device: torch.device, cases: Iterable[OperatorCase], dtype: str) -> str:
    """Compare the errors of native code and reference, relative to the norm of the exact result."""
    low = torch.float32 if dtype == TF32 else getattr(torch, dtype)
    worst: tuple[float, float, float, str] = (0.0, 0.0, 0.0, "")
    with allow_tf32(dtype == TF32):
        for case in cases:
            tensors = case.make(low)
            exact = {name: tensor.double() for name, tensor in tensors.items()}  # on the CPU
            truth = case.results(exact, "reference")
            for layout in LAYOUTS:
                moved = move_tensors(tensors, device, layout)
                native = case.results(moved, "native")
                reference = case.results(moved, "reference")
                found = native["output"].dtype
                assert found == low, f"{case}: the output is {found}, expected {low}"
                for what in truth:
                    where = f"{what} of {case}, {layout}"
                    error, other = (
                        relative_norm(each[what], truth[what]) for each in (native, reference)
                    )
                    allowed = max(MAX_ERROR_RATIO * other, _MIN_TOLERANCE[dtype])
                    assert error <= allowed, f"{where}: error {error:.2g}, reference {other:.2g}"
                    worst = max(worst, (error / allowed, error, other, where))
    _, error, other, where = worst
    return f"largest error {error:.2g}, reference {other:.2g}: {where}"


def move_tensors(
    tensors: dict[str, Tensor], device: torch.device, layout: str
) -> dict[str, Tensor]:
    """Move the tensors to the device; feature map and weight get the memory format."""
    return {
        name: tensor.to(device, memory_format=LAYOUTS[layout])
        if name in ("input", "weight")
        else tensor.to(device)
        for name, tensor in tensors.items()
    }


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 matrix products and convolutions."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def check_gradients(device: torch.device, case: OperatorCase) -> str:
    """Compare derivatives with finite differences in float64, along random directions."""
    tensors = move_tensors(case.make(torch.float64), device, "contiguous")
    leaves = {name: tensor for name, tensor in as_leaves(tensors).items() if tensor.requires_grad}

    def call(*values: Tensor) -> Tensor:
        return case.call("native", {**tensors, **dict(zip(leaves, values, strict=True))})

    try:
        # Atomic sums run in a different order each time, hence the tolerance between runs.
        torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True, nondet_tol=1e-10)
    except RuntimeError as error:
        raise AssertionError(str(error).partition("\n")[0]) from error
    return ", ".join(leaves)


class RecordedCalls(TorchDispatchMode):
    """Records the calls of dcnseg's operators, forward and backward, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record the call and run it."""
        if func.namespace == "dcnseg":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registration(
    device: torch.device, case: OperatorCase, layout: str = "channels-last"
) -> str:
    """Run `torch.library.opcheck` on the operators that a forward and a backward call."""
    # In float64: opcheck has fixed tolerances, and atomic sums differ between runs.
    tensors = move_tensors(case.make(torch.float64), device, layout)
    with RecordedCalls() as recorded:
        case.results(tensors, "native")
    for operator, arguments in recorded.calls:
        is_backward = operator._schema.name.endswith("_backward")

        def fresh(value: Any, is_backward: bool = is_backward) -> Any:
            if not isinstance(value, Tensor):
                return value
            wants_gradient = value.is_floating_point() and value.numel() and not is_backward
            return value.detach().clone().requires_grad_(bool(wants_gradient))

        with warnings.catch_warnings():  # opcheck reads .grad of a non-leaf tensor
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            torch.library.opcheck(operator, tuple(map(fresh, arguments)))
    num_calls = len(recorded.calls)
    assert num_calls >= 2, f"forward and backward made {num_calls} native calls, expected 2"
    return ", ".join(operator._schema.name for operator, _ in recorded.calls)


def check_compiled(device: torch.device, case: OperatorCase) -> str:
    """Compile forward and backward into one graph, with Inductor on a GPU, and compare."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    tensors, expected = make_expected(case, device)
    compiled = torch.compile(partial(case.call, "native"), fullgraph=True, backend=backend)
    compiled_case = replace(case, call=lambda _, given: compiled(given))
    worst = require_close(compiled_case.results(tensors, "native"), expected)
    return f"{backend}; differences up to {worst:.2g}"


def make_expected(
    case: OperatorCase, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return channels-last float32 tensors and the native results for them."""
    tensors = move_tensors(case.make(torch.float32), device, "channels-last")
    return tensors, case.results(tensors, "native")


def require_close(
    results: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = 1e-5
) -> float:
    """Return the largest relative difference; assert that it is within float32 rounding."""
    errors = {name: relative_norm(results[name], expected[name].double()) for name in expected}
    for name, error in errors.items():
        assert error <= allowed, f"{name} is off by {error:.2g}, allowed {allowed:.2g}"
    return max(errors.values())


def check_graph(device: torch.device, case: OperatorCase) -> str:
    """Capture forward and backward once and replay them with other values."""
    require_gpu(device)
    tensors = move_tensors(case.make(torch.float32), device, "channels-last")
    static = as_leaves({name: tensor.clone() for name, tensor in tensors.items()})
    leaves = [tensor for tensor in static.values() if tensor.requires_grad]
    grad = gradient_like(case.call("native", static))

    def step() -> list[Tensor]:
        output = case.call("native", static)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # as PyTorch's documentation of graph capture requires
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    worst = 0.0
    for factor in (1.0, -0.5):
        changed = {
            name: tensor if name == BOXES else tensor * factor for name, tensor in tensors.items()
        }
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(changed[name])
        graph.replay()
        expected = case.results(changed, "native")
        replayed = dict(zip(expected, captured, strict=True))
        worst = max(worst, require_close(replayed, expected))
    return f"two replays; differences up to {worst:.2g}"


def check_stream(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """Write the inputs late on the caller's stream; the operators must wait on it."""
    require_gpu(device)
    worst = 0.0
    for case in cases:
        tensors, expected = make_expected(case, device)
        late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            for name, tensor in late.items():
                tensor.copy_(tensors[name])
            results = case.results(late, "native")
        stream.synchronize()
        worst = max(worst, require_close(results, expected))
    return f"differences up to {worst:.2g}"


def check_threads(device: torch.device, cases: list[OperatorCase]) -> str:
    """Call everything repeatedly from two threads, each on its own stream."""
    rounds = 20 if device.type == "cuda" else 2
    inputs = [move_tensors(case.make(torch.float32), device, "channels-last") for case in cases]
    expected = [case.results(each, "native") for case, each in zip(cases, inputs, strict=True)]
    synchronize(device)

    def work() -> None:
        with own_stream(device):
            for _ in range(rounds):
                for case, tensors, truth in zip(cases, inputs, expected, strict=True):
                    require_close(case.results(tensors, "native"), truth)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work) for _ in range(2)]:
            future.result()
    return f"{2 * rounds * len(cases)} calls forward and backward"


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_backward_thread(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """Run the forward here, on its own stream, and the backward from a new thread."""
    worst = 0.0
    for case in cases:
        tensors, expected = make_expected(case, device)
        leaves = as_leaves(tensors)
        synchronize(device)
        with own_stream(device):
            output = case.call("native", leaves)
            grad = gradient_like(output)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(output.backward, grad).result()
        synchronize(device)
        results = {"output": output.detach()}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                results[f"gradient of {name}"] = leaf.grad
        worst = max(worst, require_close(results, expected))
    return f"differences up to {worst:.2g}"


def check_not_finite(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """Compare where NaN and infinities in feature maps and offsets go with the reference."""
    count = 0
    for case in cases:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            tensors = case.make(dtype)
            insert_not_finite(tensors)
            for layout in LAYOUTS:
                moved = move_tensors(tensors, device, layout)
                with torch.no_grad(), allow_tf32(False):
                    native = case.call("native", moved).cpu()
                    reference = case.call("reference", moved).cpu()
                atol = tolerance * float(reference[reference.isfinite()].abs().max())
                try:
                    torch.testing.assert_close(native, reference, equal_nan=True, rtol=0, atol=atol)
                except AssertionError as error:
                    where = f"{case}, {dtype}, {layout}"
                    raise AssertionError(f"{where}: {error}") from error
                count += int((~native.isfinite()).sum())
    return f"{count} values are not finite, the same as in the reference"


def insert_not_finite(tensors: dict[str, Tensor]) -> None:
    """Insert NaN and infinities into a few pixels and offsets."""
    input = tensors["input"]
    input[0, 0, 2, 3], input[1, 1, 4, 5], input[1, 2, 6, 7] = torch.nan, torch.inf, -torch.inf
    if "offset" in tensors:
        offset = tensors["offset"].view(-1)
        offset[3], offset[17], offset[40] = torch.nan, torch.inf, -torch.inf
        offset[60] = 1e30


def check_deterministic(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """With deterministic algorithms, two runs give the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in cases:
            tensors = move_tensors(case.make(torch.float32), device, "channels-last")
            with warnings.catch_warnings():  # the native code is not deterministic
                warnings.filterwarnings("ignore", message="dcnseg uses the slower PyTorch")
                once, again = (case.results(tensors, "auto") for _ in range(2))
            for name, result in once.items():
                assert torch.equal(result, again[name]), f"{case}: {name} differs between two runs"
    finally:
        torch.use_deterministic_algorithms(False)
    return "two runs are bit-identical"
