"""Which tests are left out where."""

from __future__ import annotations

import pytest

from dcnseg.ops._native import missing_reason

NEEDS_NATIVE = pytest.mark.skipif(
    missing_reason("cpu") is not None, reason=f"no native code: {missing_reason('cpu')}"
)
