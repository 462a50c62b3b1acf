"""Checks of single values of a config; each raises a `TypeError` or `ValueError` that begins with the field's name."""

from __future__ import annotations

import re
from typing import Any


def check_count(name: str, value: Any) -> None:
    """Check that a value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected a whole number, found {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name}={value}: expected at least 1.")


def check_number(name: str, value: Any, high: float) -> None:
    """Check that a value is a finite number from 0 up to, not including, `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected a number, found {type(value).__name__}.")
    # An integer may be larger than any float.
    if not 0 <= value < high or (isinstance(value, int) and value.bit_length() > 1023):
        raise ValueError(f"{name}={value}: expected a number from 0 up to, not including, {high}.")


def check_names(name: str, value: Any, a_name_alone: bool) -> None:
    """Check that a value is None or a list of names, or one name where that is allowed."""
    if value is None or (a_name_alone and isinstance(value, str) and value):
        return
    for item in as_list(name, value):
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}={value!r}: expected names, found {item!r}.")


def as_list(name: str, value: Any) -> list[Any]:
    """Return a list, tuple, set or range as a list."""
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise TypeError(f"{name}={value!r}: expected a list, found {type(value).__name__}.")
    return list(value)


def check_expression(name: str, value: str) -> None:
    """Check that a text is a regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression: {error}.") from None
