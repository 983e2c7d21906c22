"""What `gpu_check.py` looks at: one function for each thing that can be wrong on a GPU.

Entry point: `make_checks`. A check returns a line of figures, or raises `CheckFailedError` or
`CheckLeftOutError`. On a CPU the checks of streams, graphs and memory are left out.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.operator_cases import (
    BOXES,
    OperatorCase,
    as_leaves,
    gradient_like,
    make_cases,
    one_case_per_operator,
)
from dcnseg.ops import native_status
from dcnseg.ops.deform_conv import native as deform_conv_native
from dcnseg.ops.roi import native as roi_native

TF32 = "tf32"
DTYPES = ("float64", "float32", TF32, "bfloat16", "float16")
QUICK_DTYPES = ("float64", "float32", "bfloat16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
ALLOWED = 2.0  # times the error of plain PyTorch code in the same dtype

# Where plain code happens to be exact: a quarter of the distance between two numbers near 1.
_LEAST_ALLOWED = {
    "float64": 1e-14,
    "float32": 2.0**-25,
    TF32: 2.0**-12,
    "bfloat16": 2.0**-9,
    "float16": 2.0**-12,
}


class CheckFailedError(Exception):
    """What was checked is wrong."""


class CheckLeftOutError(Exception):
    """It cannot be checked here; says why."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[torch.device], str]


def make_checks(*, quick: bool) -> Iterator[Check]:
    """All checks that run in this process, in an order in which the first to fail says most."""
    yield Check("library is loaded", check_library)
    yield Check("self-tests", check_self_tests)
    cases: dict[str, list[OperatorCase]] = {}
    for case in make_cases(quick=quick):
        cases.setdefault(case.operator, []).append(case)
    for operator, own in cases.items():
        for dtype in QUICK_DTYPES if quick else DTYPES:
            if dtype != TF32 or operator == "deform_conv2d":  # the only one with a product
                yield Check(f"{operator} {dtype}", partial(check_accuracy, cases=own, dtype=dtype))
    few = list(one_case_per_operator(quick=quick))
    each: dict[str, Callable[..., str]] = {
        "gradcheck": check_gradients,
        "opcheck": check_registration,
        "torch.compile": check_compiled,
        "CUDA graph": check_graph,
    }
    for what, check in each.items():
        for case in few:
            yield Check(f"{what} of {case}", partial(check, case=case))
    together: dict[str, Callable[..., str]] = {
        "stream of the caller": check_stream,
        "two threads": check_threads,
        "backward on another thread": check_backward_thread,
        "NaN and infinities": check_not_finite,
        "deterministic algorithms": check_deterministic,
    }
    for what, check_all in together.items():
        yield Check(what, partial(check_all, cases=few))


def check_library(device: torch.device) -> str:
    state = native_status()[device.type]
    if state != "loaded":
        raise CheckFailedError(state)
    return native_status()["build"]


def check_self_tests(device: torch.device) -> str:
    tests = {
        "deform_conv2d": deform_conv_native.cuda_self_test,
        "roi_pool": roi_native.roi_pool_self_test,
        "roi_avg_pool": roi_native.roi_avg_pool_self_test,
        "deform_roi_pool": roi_native.deform_roi_pool_self_test,
    }
    for name, test in tests.items():
        reason = test(device)
        if reason is not None:
            raise CheckFailedError(f"{name} {reason}")
    return ", ".join(tests)


def check_accuracy(device: torch.device, cases: Iterable[OperatorCase], dtype: str) -> str:
    """Errors, relative to the norm of the exact result, beside those of plain PyTorch code."""
    low = torch.float32 if dtype == TF32 else getattr(torch, dtype)
    worst: tuple[float, float, float, str] = (0.0, 0.0, 0.0, "")
    with tf32_is(dtype == TF32):
        for case in cases:
            tensors = case.make(low)
            exact = {name: tensor.double() for name, tensor in tensors.items()}  # on the CPU
            truth = case.results(exact, "reference")
            for layout in LAYOUTS:
                moved = moved_to(tensors, device, layout)
                ours = case.results(moved, "native")
                plain = case.results(moved, "reference")
                if ours["output"].dtype != low:
                    raise CheckFailedError(f"{case}: the output is {ours['output'].dtype}")
                for what in truth:
                    where = f"{what} of {case}, {layout}"
                    errors = [relative_norm(each[what], truth[what]) for each in (ours, plain)]
                    allowed = max(ALLOWED * errors[1], _LEAST_ALLOWED[dtype])
                    if not errors[0] <= allowed:
                        raise CheckFailedError(
                            f"{where}: error {errors[0]:.2g}, of plain code {errors[1]:.2g}"
                        )
                    worst = max(worst, (errors[0] / allowed, errors[0], errors[1], where))
    _, error, plain_error, where = worst
    return f"at worst {error:.2g} beside {plain_error:.2g} of plain code: {where}"


def moved_to(tensors: dict[str, Tensor], device: torch.device, layout: str) -> dict[str, Tensor]:
    """The tensors on the device; those that have a memory format, maps and weights, in it."""
    return {
        name: tensor.to(device, memory_format=LAYOUTS[layout])
        if name in ("input", "weight")
        else tensor.to(device)
        for name, tensor in tensors.items()
    }


def relative_norm(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference, relative to that of the truth; NaN never passes a comparison."""
    difference = float((result.cpu().double() - truth).norm())
    scale = float(truth.norm())
    return difference / scale if scale else difference


@contextmanager
def tf32_is(allowed: bool) -> Iterator[None]:
    """Let products and convolutions of float32 take TF32 within it, or not."""
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
    """Derivatives against finite differences in float64, along random directions."""
    tensors = moved_to(case.make(torch.float64), device, "contiguous")
    leaves = {name: tensor for name, tensor in as_leaves(tensors).items() if tensor.requires_grad}

    def call(*values: Tensor) -> Tensor:
        return case.call("native", {**tensors, **dict(zip(leaves, values, strict=True))})

    try:
        # Sums by atomics come out in another order each time, hence the tolerance between runs.
        torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True, nondet_tol=1e-10)
    except RuntimeError as error:
        raise CheckFailedError(str(error).partition("\n")[0]) from error
    return ", ".join(leaves)


class RecordedCalls(TorchDispatchMode):
    """Notes the calls of our operators, forward and backward, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note and go on."""
        if func.namespace == "dcnseg":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registration(device: torch.device, case: OperatorCase) -> str:
    """`torch.library.opcheck` on what a forward and a backward call."""
    # In float64, as opcheck has tolerances of its own, and sums by atomics differ between runs.
    tensors = moved_to(case.make(torch.float64), device, "channels-last")
    with RecordedCalls() as recorded:
        case.results(tensors, "native")
    for operator, arguments in recorded.calls:
        is_backward = operator._schema.name.endswith("_backward")

        def fresh(value: Any, is_backward: bool = is_backward) -> Any:
            if not isinstance(value, Tensor):
                return value
            wants_gradient = value.is_floating_point() and value.numel() and not is_backward
            return value.detach().clone().requires_grad_(bool(wants_gradient))

        with warnings.catch_warnings():  # opcheck itself reads .grad of a tensor that is no leaf
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            torch.library.opcheck(operator, tuple(map(fresh, arguments)))
    if len(recorded.calls) < 2:
        raise CheckFailedError(f"forward and backward made {len(recorded.calls)} native calls")
    return ", ".join(operator._schema.name for operator, _ in recorded.calls)


def check_compiled(device: torch.device, case: OperatorCase) -> str:
    """One graph, forward and backward, with the same results; by Inductor on a GPU."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    tensors = moved_to(case.make(torch.float32), device, "channels-last")
    expected = case.results(tensors, "native")
    compiled = torch.compile(partial(case.call, "native"), fullgraph=True, backend=backend)
    # A frozen case keeps its call; the compiled one takes its place in a copy.
    same = OperatorCase(case.operator, case.name, case.make, lambda _, given: compiled(given))
    worst = require_close(same.results(tensors, "native"), expected)
    return f"{backend}; differences up to {worst:.2g}"


def require_close(
    results: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = 1e-5
) -> float:
    """The largest relative difference; more than rounding in float32 is an error."""
    worst = 0.0
    for name, truth in expected.items():
        error = relative_norm(results[name], truth.cpu().double())
        if not error <= allowed:
            raise CheckFailedError(f"{name} is off by {error:.2g}")
        worst = max(worst, error)
    return worst


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise CheckLeftOutError("needs a GPU")


def check_graph(device: torch.device, case: OperatorCase) -> str:
    """Forward and backward are captured once and replayed with other numbers."""
    need_gpu(device)
    tensors = moved_to(case.make(torch.float32), device, "channels-last")
    static = as_leaves({name: tensor.clone() for name, tensor in tensors.items()})
    leaves = [tensor for tensor in static.values() if tensor.requires_grad]
    grad = gradient_like(case.call("native", static))

    def step() -> list[Tensor]:
        output = case.call("native", static)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # as torch's own notes on capture ask for
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
    """Inputs are written late on a stream of the caller's, on which the operators must wait."""
    need_gpu(device)
    worst = 0.0
    for case in cases:
        tensors = moved_to(case.make(torch.float32), device, "channels-last")
        expected = case.results(tensors, "native")
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
    """Two threads, each on a stream of its own, call everything again and again."""
    rounds = 20 if device.type == "cuda" else 2
    inputs = [moved_to(case.make(torch.float32), device, "channels-last") for case in cases]
    expected = [
        case.results(tensors, "native") for case, tensors in zip(cases, inputs, strict=True)
    ]
    synchronize(device)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with own_stream(device):
                for _ in range(rounds):
                    for case, tensors, truth in zip(cases, inputs, expected, strict=True):
                        require_close(case.results(tensors, "native"), truth)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise CheckFailedError(f"on a thread: {failures[0]}")
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
    """The forward runs here, on a stream of its own; the backward is called by a new thread."""
    worst = 0.0
    for case in cases:
        tensors = moved_to(case.make(torch.float32), device, "channels-last")
        expected = case.results(tensors, "native")
        leaves = as_leaves(tensors)
        synchronize(device)
        with own_stream(device):
            output = case.call("native", leaves)
            grad = gradient_like(output)
        thread = threading.Thread(target=output.backward, args=(grad,))
        thread.start()
        thread.join()
        synchronize(device)
        results = {"output": output.detach()}
        for name in expected:
            if name != "output":
                found = leaves[name.removeprefix("gradient of ")].grad
                if found is None:
                    raise CheckFailedError(f"{case}: there is no {name}")
                results[name] = found
        worst = max(worst, require_close(results, expected))
    return f"differences up to {worst:.2g}"


def check_not_finite(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """NaN and infinities in maps and offsets go where plain code has them, and nowhere else."""
    count = 0
    for case in cases:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            tensors = case.make(dtype)
            place_what_is_not_finite(tensors)
            for layout in LAYOUTS:
                moved = moved_to(tensors, device, layout)
                with torch.no_grad(), tf32_is(False):
                    ours = case.call("native", moved).cpu()
                    plain = case.call("reference", moved).cpu()
                scale = float(plain[plain.isfinite()].abs().max())
                try:
                    torch.testing.assert_close(
                        ours, plain, equal_nan=True, rtol=0, atol=tolerance * scale
                    )
                except AssertionError as error:
                    where = f"{case}, {dtype}, {layout}"
                    raise CheckFailedError(f"{where}: {error}") from error
                count += int((~ours.isfinite()).sum())
    return f"{count} results are not finite, all of them in the right places"


def place_what_is_not_finite(tensors: dict[str, Tensor]) -> None:
    """Put NaN and infinities into a few pixels and offsets."""
    input = tensors["input"]
    input[0, 0, 2, 3], input[1, 1, 4, 5], input[1, 2, 6, 7] = torch.nan, torch.inf, -torch.inf
    if "offset" in tensors:
        offset = tensors["offset"].view(-1)
        offset[3], offset[17], offset[40] = torch.nan, torch.inf, -torch.inf
        offset[60] = 1e30


def check_deterministic(device: torch.device, cases: Iterable[OperatorCase]) -> str:
    """Where torch is told to be deterministic, two runs give the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        for case in cases:
            tensors = moved_to(case.make(torch.float32), device, "channels-last")
            with warnings.catch_warnings():  # of the slower code that this takes
                warnings.filterwarnings("ignore", message="dcnseg takes the slower PyTorch code")
                once, again = (case.results(tensors, "auto") for _ in range(2))
            for name, result in once.items():
                if not torch.equal(result, again[name]):
                    raise CheckFailedError(f"{case}: {name} differs between two runs")
    finally:
        torch.use_deterministic_algorithms(False)
    return "the same bits twice"
