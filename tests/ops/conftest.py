"""Fixtures of the tests of several operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dcnseg.ops.backend import Backend
from tests.ops.common import NEEDS_NATIVE


# Session scope, because hypothesis runs many examples with one fixture value.
@pytest.fixture(scope="session", params=[pytest.param("native", marks=NEEDS_NATIVE), "reference"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each implementation of an operator."""
    chosen: Backend = request.param
    return chosen


@pytest.fixture
def same_threads_after() -> Iterator[None]:
    """Restores torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
