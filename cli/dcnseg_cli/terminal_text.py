"""Escapes text for the terminal, so that file names cannot control it.

Entry points: `escape_line` for a result, `escape_message`, and `escape_controls` for any text.
"""

from __future__ import annotations

import re

# What moves the cursor, changes the terminal, reorders or hides other characters, or is half of a
# surrogate pair: C0 and C1, marks of direction, invisible characters, separators of lines, tags.
# The joiners U+200C and U+200D are left alone, since Persian, Hindi and emoji need them.
_CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_NOT_A_LIST = re.compile("\n(?!  )")
_UNDECODED = range(0xDC80, 0xDD00)  # as Python holds bytes of a file's name that are no UTF-8


def escape_controls(text: str) -> str:
    r"""Write every control character but the line feed as an escape sequence such as `\x1b`.

    Bytes that could not be decoded are written as they are in the name of the file, such as `\xff`.
    """
    return _CONTROLS.sub(_escape, text)


def escape_line(text: str) -> str:
    r"""Write the line feed as `\n` as well, so that a name cannot pretend to be another line."""
    return escape_controls(text).replace("\n", r"\n")


def escape_message(text: str) -> str:
    r"""Write a line feed as `\n` unless it begins an indented line, as those of lists are."""
    return _NOT_A_LIST.sub(r"\\n", escape_controls(text))


def has_controls(text: str) -> bool:
    """Whether `escape_controls` would change the text."""
    return _CONTROLS.search(text) is not None


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number in _UNDECODED:
        return f"\\x{number - 0xDC00:02x}"
    if number < 0x80:
        return {9: r"\t", 13: r"\r"}.get(number, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
