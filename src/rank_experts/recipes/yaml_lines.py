"""YAML that people wrote, with the line of everything in it, and errors that say where.

ruamel.yaml parses it. What could hurt is refused before a value is made: nesting without end, values that contain
themselves, and aliases that stand for more than anyone would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

Location = tuple[str | int, ...]

_MAX_BYTES = 2**20
_MAX_VALUES = 20_000
_MAX_DEPTH = 20


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has a line for everything that is wrong with it."""


class Lines:
    """Knows in which line of a YAML text a value stands.

    Args:
        root: The text's node, of ruamel.yaml; None of an empty one.
    """

    def __init__(self, root: Any) -> None:
        self.root = root

    def find(self, location: Location) -> int:
        """Return the line of a value, 1 for the first, or of the nearest one around it that is there."""
        node, line = self.root, 0
        for step in location:
            entries: Any = getattr(node, "value", None)
            if isinstance(node, MappingNode):
                found = [(key, value) for key, value in entries if key.value == str(step)]
            elif isinstance(entries, list) and isinstance(step, int) and step < len(entries):
                found = [(entries[step], entries[step])]
            else:
                found = []
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line
        return line + 1


def read_yaml(file: Path) -> tuple[Any, Lines]:
    """Read a YAML file.

    Raises:
        RecipeError: It is too large, no text, no YAML, or has values that cannot be read; the message has the line.
    """
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise RecipeError(f"{file}:1: {size} bytes are too many for a recipe: expected at most {_MAX_BYTES}.")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text: {error.reason}.") from None
    try:
        return parse_yaml(text)
    except _BadYAML as error:
        raise RecipeError(f"{file}:{error.line}: {error}") from None


def parse_value(text: str, origin: str) -> Any:
    """Parse the value of an override.

    Args:
        text: YAML.
        origin: Names it in messages.

    Raises:
        RecipeError: It cannot be read.

    Example:
        >>> parse_value("[1, a]", "override 'x'")
        [1, 'a']
    """
    try:
        return parse_yaml(text)[0]
    except _BadYAML as error:
        raise RecipeError(f"{origin}: {error}") from None


class _BadYAML(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[Any, Lines]:
    """Parse one document of YAML, whose values are text, numbers, lists and mappings.

    Raises:
        ValueError: It cannot be read; the error has a `line`.
    """
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        _check(root)
        return YAML(typ="safe", pure=True).load(text), Lines(root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or error.context or "not YAML").split("\n")[0]
        raise _BadYAML(mark.line + 1 if mark else 1, problem) from None
    except YAMLError as error:
        raise _BadYAML(1, str(error).split("\n")[0]) from None
    except RecursionError:
        raise _BadYAML(1, "the values are nested too deeply.") from None


def _check(root: Any) -> None:
    # Depth first with a budget: an alias counts as often as it is used.
    constructor = YAML(typ="safe", pure=True).constructor
    count = 0
    pending = [(root, 0)] if root is not None else []
    while pending:
        node, depth = pending.pop()
        count += 1
        line = node.start_mark.line + 1
        if depth > _MAX_DEPTH:
            raise _BadYAML(line, "values are nested too deeply, or contain themselves.")
        if count > _MAX_VALUES:
            raise _BadYAML(line, f"more than {_MAX_VALUES} values, counting each use of an alias.")
        if isinstance(node, ScalarNode):
            try:
                constructor.construct_object(node)
            except (ValueError, OverflowError) as error:
                raise _BadYAML(line, f"{node.value!r} cannot be read: {error}. Put text into quotes.") from None
        elif isinstance(node, MappingNode):
            pending += [(part, depth + 1) for pair in node.value for part in pair]
        else:
            pending += [(item, depth + 1) for item in node.value]
