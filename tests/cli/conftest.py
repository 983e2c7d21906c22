from __future__ import annotations

from collections.abc import Callable

import pytest
from dcnseg_cli.main import app
from typer.testing import CliRunner, Result

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command line in this process; stdout and stderr are apart."""
    monkeypatch.delenv("DCNSEG_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run
