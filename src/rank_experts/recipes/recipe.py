"""The YAML that the command line trains from: its sections, and errors that name the line and the nearest key.

`recipe_yaml.py` reads the file and knows the lines; pydantic checks it. Nothing here loads data or models.
"""

from __future__ import annotations

import inspect
import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError

from ..config.config import RankExpertConfig
from ..messages import nearest
from ..training.metrics import METRICS
from .yaml_lines import Lines, Location, RecipeError, parse_value, read_yaml

# Above it, tokenizers and samplers end in an OverflowError that names no line.
_MOST = 2**31 - 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(_Section):
    """The base model: `name` is a Hub name or a folder."""

    name: str
    kind: Literal["classification", "causal", "seq2seq"] = "classification"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int = Field(default=128, ge=2, le=_MOST)
    pooling: Literal["mean", "first", "last"] = "mean"
    trust_remote_code: bool = False


class AdapterSection(BaseModel):
    """The method, and any field of `RankExpertConfig` or argument of its preset."""

    model_config = ConfigDict(extra="allow")

    method: Literal["smora", "more", "mixture", "lora"] = "smora"

    def config(self, tasks: Sequence[str]) -> RankExpertConfig:
        """Build the config; a task router gets the recipe's tasks."""
        values = dict(self.model_extra or {})
        if self.method == "more":
            values["tasks"] = list(tasks)
        values.setdefault("target_modules", "all-linear")
        return getattr(RankExpertConfig, self.method)(**values)


class TaskSection(_Section):
    """One task: where its examples are and how they are written.

    `source` is a folder or a Hub name, `train` and `validation` its splits; without `source` they are files. A split
    may be cut: `validation[:80%]`.
    """

    source: str | None = None
    subset: str | None = None
    train: str | list[str] = "train"
    validation: str | list[str] = "validation"
    limit: int | None = Field(default=None, ge=1, le=_MOST)
    text: str | None = None
    text_pair: str | None = None
    columns: list[str] | None = Field(default=None, min_length=1, max_length=2)
    prompt: str | None = None
    target: str | None = None
    label: str = "label"
    labels: list[str] | None = Field(default=None, min_length=2)
    regression: bool = False
    head: str | None = None
    metric: str | list[str] | None = None

    def templates(self, kind: str) -> list[str]:
        """Return the templates that make an example: the text and its pair, or the prompt and the target."""
        if kind != "classification":
            return [self.prompt or "", self.target or ""]
        if self.columns:
            return ["{" + column + "}" for column in self.columns]
        return [template for template in (self.text, self.text_pair) if template is not None]

    def metrics(self, kind: str) -> list[str]:
        """Return the metrics' names, the first of them the one by which models are compared."""
        if self.metric is not None:
            return [self.metric] if isinstance(self.metric, str) else self.metric
        return ["exact_match"] if kind != "classification" else ["pearson"] if self.regression else ["accuracy"]


class DataSection(_Section):
    """How tasks are mixed."""

    sampling: Literal["proportional", "uniform", "temperature", "balanced"] = "balanced"
    temperature: float = Field(default=2.0, gt=0)
    batches: Literal["mixed", "single"] = "mixed"
    epoch_size: int | None = Field(default=None, ge=1, le=_MOST)


class Recipe(_Section):
    """All of a training: see docs/training.md."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    tasks: dict[str, TaskSection] = Field(min_length=1)
    data: DataSection = DataSection()
    training: dict[str, Any] = {}
    _where: Callable[[Location], str] | None = PrivateAttr(default=None)

    def error(self, location: Location, text: str) -> RecipeError:
        """Make the error for a value that turns out later to be of no use, in the form of `read_recipe`'s own.

        Args:
            location: The keys that lead to it.
            text: What is wrong.
        """
        where = "" if self._where is None else f"{self._where(location)}: "
        return RecipeError(f"{where}{_dotted(location)}{text}")


OWN_TRAINING_KEYS = ("router_learning_rate", "head_learning_rate")
"""Keys of `training` that are `RankExpertTrainer`'s, beside those of `TrainingArguments`."""

# What TrainingArguments takes as it comes and training stumbles over.
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_POSITIVE = ("num_train_epochs", "learning_rate", *OWN_TRAINING_KEYS)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        overrides: `key=value` with dots between the keys: `training.learning_rate=1e-3`, `tasks.rte.limit=100`. The
            value is YAML, and a template where it begins with a brace.

    Raises:
        FileNotFoundError: There is no such file.
        RecipeError: Everything that is wrong, a line each, with the line of the file and the nearest key.

    Example:
        >>> recipe = read_recipe("config.yaml", ["adapter.r=32"])  # doctest: +SKIP
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there. Expected a recipe; see docs/training.md.")
    values, lines = read_yaml(file)
    if not isinstance(values, dict):
        raise RecipeError(f"{file}:1: expected the sections {', '.join(Recipe.model_fields)}.")
    origins = _override(values, overrides)
    problems: list[tuple[Location, str]] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_problem(found) for found in error.errors()]
    if recipe is not None:
        problems = _check(recipe)
    if problems:
        located = [(_where(file, lines, origins, location), location, text) for location, text in problems]
        raise RecipeError("\n".join(f"{where}: {_dotted(location)}{text}" for where, location, text in located))
    assert recipe is not None
    recipe._where = lambda location: _where(file, lines, origins, location)
    return recipe


def _override(values: dict[str, Any], overrides: Sequence[str]) -> dict[Location, str]:
    origins: dict[Location, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: expected key=value, for instance training.max_steps=100.")
        *parents, last = key.strip().split(".")
        node = values
        for step in parents:
            if node.get(step) is None:
                node[step] = {}
            node = node[step]
            if not isinstance(node, dict):
                raise RecipeError(f"override {override!r}: {step!r} holds a value, not keys.")
        # A template, "{premise}", is text and not a YAML mapping.
        origin = f"override {override!r}"
        node[last] = text if text.lstrip().startswith("{") else parse_value(text, origin)
        origins[(*parents, last)] = override
    return origins


def _where(file: Path, lines: Lines, origins: dict[Location, str], location: Location) -> str:
    for end in range(len(location), 0, -1):
        if location[:end] in origins:
            return f"override {origins[location[:end]]!r}"
    return f"{file}:{lines.find(location)}"


def _dotted(location: Location) -> str:
    return ".".join(map(str, location)) + ": " if location else ""


def _problem(error: Any) -> tuple[Location, str]:
    location: Location = error["loc"]
    if error["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        return location, f"unknown key.{nearest(str(location[-1]), known)} Known are {', '.join(known)}."
    if error["type"] == "missing":
        return location, "is missing."
    given = "" if isinstance(error["input"], (dict, list)) else f" Found {error['input']!r}."
    hint = ""
    if error["type"] == "literal_error":
        hint = nearest(str(error["input"]), re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    # pydantic puts the branch of a union behind the key.
    location = tuple(step for step in location if step not in ("str", "list[str]"))
    return location, f"{error['msg'][0].lower()}{error['msg'][1:]}.{given}{hint}"


def _keys_at(location: Location) -> list[str]:
    section: Any = Recipe
    for step in location:
        if step == "tasks":
            return list(TaskSection.model_fields)
        section = section.model_fields[str(step)].annotation
    return list(section.model_fields)


def _check(recipe: Recipe) -> list[tuple[Location, str]]:
    problems = _check_adapter(recipe) + _check_training(recipe)
    for name, task in recipe.tasks.items():
        problems += [(("tasks", name, *location), text) for location, text in _check_task(task, recipe.model.kind)]
    return problems


def _check_adapter(recipe: Recipe) -> list[tuple[Location, str]]:
    preset = inspect.signature(getattr(RankExpertConfig, recipe.adapter.method)).parameters
    known = {field.name for field in fields(RankExpertConfig)} | set(preset) - {"kwargs", "tasks"}
    problems: list[tuple[Location, str]] = []
    for key in recipe.adapter.model_extra or {}:
        if key in ("tasks", "router"):
            text = "is set by the section tasks." if key == "tasks" else "is set by method."
            problems.append((("adapter", key), text))
        elif key not in known:
            problems.append((("adapter", key), f"unknown key.{nearest(key, known | {'method'})}"))
    if not problems:
        try:
            recipe.adapter.config(list(recipe.tasks))
        except (TypeError, ValueError) as error:
            # The config's messages begin with the field.
            field = re.match(r"(\w+)=", str(error))
            key_location: Location = ("adapter", field[1]) if field and field[1] in known else ("adapter",)
            problems.append((key_location, str(error)))
    return problems


def _check_training(recipe: Recipe) -> list[tuple[Location, str]]:
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments) if field.init}
    hints = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name in names}
    hints |= dict.fromkeys(OWN_TRAINING_KEYS, float | None)
    problems: list[tuple[Location, str]] = []
    for key, value in recipe.training.items():
        if key not in hints:
            problems.append((("training", key), f"unknown key.{nearest(key, hints)}"))
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = " or ".join(
                dict.fromkeys(found["msg"].removeprefix("Input should be ") for found in error.errors())
            )
            problems.append((("training", key), f"expected {expected}. Found {value!r}."))
            continue
        if key in _AT_LEAST_ONE and value < 1:
            problems.append((("training", key), f"expected at least 1. Found {value!r}."))
        if key in _POSITIVE and value is not None and not (0 < value < math.inf):
            problems.append((("training", key), f"expected a number above 0. Found {value!r}."))
    if not recipe.training.get("output_dir"):
        problems.append((("training",), "output_dir is missing: where checkpoints and the adapter go."))
    return problems


def _check_task(task: TaskSection, kind: str) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    for key in ("train", "validation"):
        names = getattr(task, key)
        if not all([names] if isinstance(names, str) else names or [""]):
            problems.append(((key,), "is empty: expected a split's name, or files."))
    if kind == "classification":
        if (task.text is None) == (task.columns is None):
            problems.append(((), "expected either text (a template) or columns (one or two of them)."))
        for key in ("prompt", "target"):
            if getattr(task, key) is not None:
                problems.append(((key,), "is for model.kind causal and seq2seq; classification reads text or columns."))
        if task.regression and task.labels is not None:
            problems.append((("labels",), "a task with regression: true has numbers, not label names."))
    else:
        problems += [((key,), "is missing.") for key in ("prompt", "target") if getattr(task, key) is None]
        for key in ("text", "text_pair", "columns", "head"):
            if getattr(task, key) is not None:
                problems.append(((key,), f"is for model.kind classification; {kind} reads prompt and target."))
    for metric in task.metrics(kind):
        if metric not in METRICS:
            known = ", ".join(METRICS)
            problems.append((("metric",), f"unknown metric {metric!r}: {known}.{nearest(metric, METRICS)}"))
        elif kind != "classification" and metric not in ("accuracy", "exact_match"):
            problems.append((("metric",), f"{metric!r} does not score text: use exact_match or accuracy (of tokens)."))
    for template in task.templates(kind):
        try:
            template_columns(template)
        except ValueError as error:
            problems.append(((), f"template {template!r}: {error}"))
    return problems


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names.

    Raises:
        ValueError: A brace is open, or a field is more than a column's name.

    Example:
        >>> template_columns("{premise} Does it follow that {hypothesis}?")
        ['premise', 'hypothesis']
    """
    columns = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or re.search(r"[.\[\]]", name) or spec or conversion:
            raise ValueError(f"{{{name}}} is not a column's name. Write braces that are text twice: {{{{ }}}}.")
        columns.append(name)
    return columns
