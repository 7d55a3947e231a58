"""Names and lines that others chose, shown so that a terminal only ever prints them.

A model, a parameter, a file or a source line may hold an escape sequence, which would move the cursor, set the title of
the window or hide what stands before it.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text with every character that is not printable, newlines among them, written as an escape: `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some_lines(text: str) -> str:
    """The same for a text whose newlines are meant."""
    return "\n".join(map(one_line, text.split("\n")))
