"""Nothing that is printed can control the terminal, whatever files and weights are called."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnseg_cli.console import open_console
from dcnseg_cli.reporting import echo, escape_unencodable_text, print_json
from dcnseg_cli.terminal_text import (
    escape_controls,
    escape_line,
    escape_message,
    has_controls,
)
from tests.conftest import SMALL_TRAINING, Invoke, rewrite_weights

# Clears the screen, sets the title, forges a line, reverses what follows, is no UTF-8, is markup.
HOSTILE = "\x1b[2J\x1b]0;x\x07\nError: forged\x9b1m\u202eb\u2066\x7f[bold]:x:\udcff"
IN_JSON = HOSTILE.replace("\n", "").rstrip("\udcff")  # what names of classes can be
BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
# What rich writes itself on a terminal: colors, and the lines that its progress bars redraw.
RICH = re.compile(r"\x1b\[(?:[0-9;]*m|2K|1A|\?25[lh])|\r")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain ä 漢字 \u200d", "plain ä 漢字 \u200d"),
        ("a\nb", r"a\nb"),
        ("\x1b\t\r\x00\x7f\x9b", r"\x1b\t\r\x00\x7f\u009b"),
        ("\udcff\ud800\u202e\ufeff\U000e0041", r"\xff\ud800\u202e\ufeff\U000e0041"),
    ],
)
def test_escapes(text: str, line: str) -> None:
    assert escape_line(text) == line
    assert escape_controls(text) == line.replace(r"\n", "\n")


def test_a_name_in_a_message_cannot_pretend_to_be_another_line() -> None:
    text = "2 things are wrong:\n  a\nError: forged\n  b"
    assert escape_message(text) == "2 things are wrong:\n  a\\nError: forged\n  b"


@given(st.text())
def test_what_is_escaped_has_no_controls_and_is_escaped_once(text: str) -> None:
    escaped = escape_controls(text)
    assert not has_controls(escaped)
    assert escape_controls(escaped) == escaped
    assert not [c for c in escaped if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
    assert not [c for c in escaped if unicodedata.bidirectional(c) in BIDI]


@pytest.fixture
def hostile(scenes: Path, run: Path, tmp_path: Path) -> Path:
    """A data folder `data`, weights and a broken image, with hostile names everywhere."""
    folder = tmp_path / HOSTILE.rstrip("\udcff")  # safetensors opens no path that is no UTF-8
    data = folder / "data"
    shutil.copytree(scenes, data)
    for kind in ("train/images", "train/masks", "val/images", "val/masks"):
        first = min((data / kind).iterdir())
        first.rename(first.with_name(HOSTILE + first.suffix))
    (folder / f"{HOSTILE}broken.jpg").write_bytes(b"no image")
    content = json.loads((data / "classes.json").read_text())
    for entry in content["classes"]:
        entry["name"] += IN_JSON
    (data / "classes.json").write_text(json.dumps(content))
    header = {"classes": content, "scores": {IN_JSON: IN_JSON}}
    rewrite_weights(run, folder / "weights.safetensors", header)
    return folder


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_command_lets_control_characters_through(
    invoke: Invoke, hostile: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    data, weights = hostile / "data", hostile / "weights.safetensors"
    images = (data / "val" / "images", next(hostile.glob("*broken.jpg")))
    cpu = "--device=cpu"
    for code, arguments in (
        (0, ("check", data)),
        (0, ("check", data, "--json")),
        (3, ("check", hostile / "none")),
        (0, ("info", weights)),
        (0, ("info", weights, "--json")),
        (0, ("evaluate", weights, data, cpu)),
        (0, ("evaluate", weights, data, cpu, "--json")),
        (3, ("predict", weights, *images, "--out", hostile / "p", cpu)),
        (3, ("predict", weights, *images, "--out", hostile / "q", cpu, "--json")),
        (3, ("visualize-offsets", weights, images[1], "--out", hostile / "o", cpu)),
        (0, ("train", data, "--out", hostile / "run", *SMALL_TRAINING)),
        (2, ("train", hostile, "--resume", hostile / "run")),
        (1, ("info", hostile / "none")),
    ):
        if is_terminal and "--json" in arguments:
            continue
        result = invoke(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        for text in (result.stdout, result.stderr):
            text = RICH.sub("", text) if is_terminal else text
            assert not has_controls(text), (arguments, escape_line(text))
            assert "\nError: forged" not in text, arguments
        if "--json" in arguments:
            contents = [json.loads(line) for line in result.stdout.splitlines()]
            assert IN_JSON in _texts(contents)


def _texts(content: object) -> str:
    """All the strings of a JSON value."""
    if isinstance(content, dict):
        content = list(content.items())
    return "".join(map(_texts, content)) if isinstance(content, list | tuple) else str(content)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_stdout_cannot_encode_never_fails(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    name = "\u6f22 \udcff.png"
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding, write_through=True))
    escape_unencodable_text()
    echo(name)
    open_console().print(name)
    print_json({"image": name})
    *lines, last = buffer.getvalue().decode().splitlines()
    assert json.loads(last) == {"image": name}
    for line in lines:
        assert line in ("\u6f22 \\xff.png", "\\u6f22 \\xff.png")
    assert (lines[1][0] == "\u6f22") == (encoding == "utf-8")
