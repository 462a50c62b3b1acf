"""Words for people: the nearest known name, text that a terminal can show, and warnings that are shown once."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " The nearest is 'x'." for an unknown name, or an empty string where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" The nearest is {found[0]!r}." if found else ""


def printable(text: str) -> str:
    r"""Return a text on one line, with whatever is no printable character as its escape.

    Names come out of other people's files: to a terminal they could move the cursor, or hide what stands before them.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@functools.cache
def warn_once(message: str) -> None:
    """Warn with a `UserWarning`; the same message again says nothing."""
    warnings.warn(message, UserWarning, stacklevel=3)
