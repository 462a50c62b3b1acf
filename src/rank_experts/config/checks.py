"""Checks of a config's values; each raises a `TypeError` or `ValueError` that begins with the field's name."""

from __future__ import annotations

import re
from typing import Any

from .expressions import MOST_WAYS, ways

MAX_FLOAT = 3.4028234663852886e38
"""float32's largest number, in which adapters compute; what is above is infinite there."""


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
    if not 0 <= value < high:
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


def check_expression(name: str, value: str, within: str = "{}") -> None:
    """Check that a text is a regular expression, and one that does not take forever.

    Args:
        name: The field's.
        value: The text.
        within: The expression of PEFT's that it becomes part of, in the place of the braces.
    """
    try:
        re.compile(value)
        number = ways(within.replace("{}", value))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression: {error}.") from None
    if number > MOST_WAYS:
        raise ValueError(
            f"{name}: {value!r} may match a name in so many ways that trying them does not end. Use fewer repetitions "
            "(* and +), none within another, or a list of names."
        )


def check_number_of_names(name: str, value: Any, most: int) -> None:
    """Check that there are not so many names that matching all modules with each of them does not end."""
    if len(value) > most:
        raise ValueError(f"{name} has {len(value):,} entries: expected at most {most:,}.")


def check_text(name: str, value: Any) -> None:
    """Check that whatever is text in a value, in lists and dicts too, can be written to a file as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: {value!r} is not Unicode text that can be saved: {error.reason}.") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(name, key)
            check_text(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            check_text(name, item)


def check_patterns(name: str, value: dict[Any, Any]) -> None:
    """Check the keys of a pattern, which PEFT matches with the ends of modules' names, one key after the other."""
    check_number_of_names(name, value, 10_000)  # and compiles them each time
    for key in value:
        if not isinstance(key, str) or not key:
            raise TypeError(f"{name}={value!r}: expected names of modules as keys, found {key!r}.")
        check_expression(name, key, r"(.*\.)?({})$")


def check_experts(r: int, expert_rank: int, top_k: int, where: str) -> None:
    """Check that r ranks divide into experts and that top_k of them exist.

    Args:
        r: Ranks of the layer.
        expert_rank: Ranks an expert.
        top_k: Active experts a token.
        where: Names the layer or the config in the message.

    Raises:
        ValueError: They do not.

    Example:
        >>> check_experts(r=64, expert_rank=8, top_k=2, where="q_proj")
    """
    if r % expert_rank:
        raise ValueError(
            f"{where}: r={r} is not a multiple of expert_rank={expert_rank}. "
            f"Choose r={r - r % expert_rank or expert_rank} or r={r - r % expert_rank + expert_rank}, "
            "or an expert_rank that divides r."
        )
    if not 1 <= top_k <= r // expert_rank:
        raise ValueError(
            f"{where}: top_k={top_k} is outside 1…{r // expert_rank}, the number of experts "
            f"(r={r} / expert_rank={expert_rank}). Choose a top_k in that range, or a larger r."
        )


def check_token_indices(value: Any) -> None:
    """Refuse what is no list of token ids, no dict of a layer's name to one, and not None, with a `TypeError`."""
    for name, tokens in value.items() if isinstance(value, dict) else {"": value}.items():
        listed = isinstance(tokens, (list, tuple)) and len(tokens) > 0 and isinstance(name, str)
        if value is not None and not (listed and all(type(i) is int and i >= 0 for i in tokens)):
            raise TypeError(
                f"trainable_token_indices={value!r}: expected a list of token ids, or a dict of a layer's name to one."
            )
