"""What the tests of several operators need."""

from __future__ import annotations

import pytest

from dcnseg.ops.backend import Backend
from tests.ops.marks import NEEDS_NATIVE


# Of the session, as hypothesis runs many examples with one value.
@pytest.fixture(scope="session", params=[pytest.param("native", marks=NEEDS_NATIVE), "reference"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Either code, one after the other."""
    chosen: Backend = request.param
    return chosen
