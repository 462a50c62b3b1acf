"""How long a regular expression may take: a bound, computed from the expression before it is used.

Python's `re` tries one way after another in which an expression can match. `(a+)+b` has 2ⁿ of them on n letters, and
a config that came from elsewhere may hold such a one. What is counted here are these ways on a name of `LONGEST`
characters, never too few and often too many. Those of a sequence multiply, those of alternatives add up, and a
repetition has as many as it has lengths; k repetitions without end that follow each other divide the name in as many
ways as k places can be chosen. A repetition of something that has several ways has all of their products, unless each
round of it ends at one place, as in `(\\w+\\.)*`.

PEFT matches names once more by itself, so that matching without backtracking here would not be enough.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

try:
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as codes
    import sre_parse as parser

LONGEST = 100
MOST_WAYS = 2e7

_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", codes.MAX_REPEAT))
_SETS = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.CATEGORY)


def ways(expression: str) -> float:
    """Return how many ways an expression may have to match a name of `LONGEST` characters, at most.

    Raises:
        re.error, RecursionError, OverflowError: It is no regular expression.

    Example:
        >>> ways(r"model\\.layers\\.\\d+\\.(q|k)_proj"), ways(".*a.*b"), ways("(a+)+b")
        (101.0, 5253.0, inf)
    """
    return _sequence(list(parser.parse(expression)))


def _sequence(items: list[Any]) -> float:
    found = [_ways(item) for item in items]
    endless = [item[0] in _REPEATS and number == LONGEST + 1 for item, number in zip(items, found)]
    others = math.prod((number for number, free in zip(found, endless) if not free), start=1.0)
    return math.comb(LONGEST + sum(endless), sum(endless)) * others


def _ways(item: Any) -> float:
    code, value = item
    if code in _REPEATS:
        high, inner = min(int(value[1]), LONGEST), list(value[2])
        lengths = LONGEST + 1 if value[1] >= LONGEST else high - min(int(value[0]), high) + 1
        return _repeated(lengths, high, inner)
    if code == codes.BRANCH:
        branches = [list(branch) for branch in value[1]]
        return 1.0 if _exclusive(branches) else math.fsum(map(_sequence, branches))
    if code == codes.SUBPATTERN:
        return _sequence(list(value[-1]))
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _sequence(list(value[1]))
    if code == codes.GROUPREF_EXISTS:
        return math.fsum(_sequence(list(branch)) for branch in value[1:] if branch is not None)
    if code == getattr(codes, "ATOMIC_GROUP", None):
        return _sequence(list(value))
    return 1.0


def _repeated(lengths: int, high: int, inner: list[Any]) -> float:
    one = _sequence(inner)
    if one == 1 or _ends_at_one_place(inner):
        return float(lengths) * one
    return lengths * one**high if high * math.log(one) < math.log(MOST_WAYS) + 1 else math.inf


def _exclusive(branches: list[list[Any]]) -> bool:
    # Of plain words none of which begins another, one at most matches at a place.
    if not all(branch and all(code == codes.LITERAL for code, _ in branch) for branch in branches):
        return False
    words = sorted(tuple(value for _, value in branch) for branch in branches)
    return not any(longer[: len(word)] == word for word, longer in itertools.pairwise(words))


def _ends_at_one_place(items: list[Any]) -> bool:
    # One repetition of single characters, and then a character that is none of them.
    while len(items) == 1 and items[0][0] == codes.SUBPATTERN:
        items = list(items[0][1][-1])
    places = [place for place, item in enumerate(items) if item[0] not in _SETS]
    if len(places) != 1 or items[places[0]][0] not in _REPEATS or places[0] + 1 == len(items):
        return False
    repeated, after = list(items[places[0]][1][2]), items[places[0] + 1]
    if len(repeated) != 1 or repeated[0][0] not in _SETS or after[0] != codes.LITERAL:
        return False
    return re.match(_set_as_text(repeated[0]), chr(after[1]), re.DOTALL) is None


def _set_as_text(item: Any) -> str:
    code, value = item
    if code == codes.ANY:
        return "."
    if code in (codes.LITERAL, codes.NOT_LITERAL):
        return f"[{'^' if code == codes.NOT_LITERAL else ''}{re.escape(chr(value))}]"
    if code == codes.CATEGORY:
        return f"[{_CATEGORIES[value]}]"
    parts = []
    for inner, found in value:
        if inner == codes.NEGATE:
            parts.append("^")
        elif inner == codes.RANGE:
            parts.append(f"{re.escape(chr(found[0]))}-{re.escape(chr(found[1]))}")
        else:
            parts.append(_CATEGORIES[found] if inner == codes.CATEGORY else re.escape(chr(found)))
    return f"[{''.join(parts)}]"


_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
