"""Warnings that are shown once a process, however often their cause recurs."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn with a `UserWarning`; the same message again says nothing."""
    warnings.warn(message, UserWarning, stacklevel=3)
