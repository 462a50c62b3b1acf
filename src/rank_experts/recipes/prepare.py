"""From a recipe's tasks to tokenised datasets, with everything checked that can be known before training.

Whatever is wrong with the data (a file that is not there, a column that a template names and the data lacks, labels
that are missing or unknown, rows of which nothing is left) is said here, with the task's name and the row.
"""

from __future__ import annotations

import glob
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset

from ..files.heads import check_heads
from ..messages import nearest
from ..training.heads import HeadSpec, regression_spec
from .recipe import Recipe, TaskSection, template_columns

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}


@dataclass
class PreparedTask:
    """A task's data.

    Attributes:
        train: Tokenised training examples.
        validation: Tokenised validation examples.
        head: Classification: what its head predicts.
        shown: A few training examples as text, for the eye.
        cut: The share of training examples that `max_length` cut.
    """

    train: Dataset
    validation: Dataset
    head: HeadSpec | None
    shown: list[str]
    cut: float


def prepare(recipe: Recipe, tokenizer: Any, folder: Path) -> dict[str, PreparedTask]:
    """Load, render and tokenise every task.

    Args:
        recipe: Checked.
        tokenizer: The model's.
        folder: Where relative paths start: the recipe's folder.

    Raises:
        FileNotFoundError: A file, folder or split is not there.
        ValueError: A task is empty or without labels, a template names a column that is not there, a label is
            unknown, an example has no tokens to learn from, or label sets clash in a shared head.
    """
    prepared = {}
    for name, task in recipe.tasks.items():
        train, validation = (read_split(name, task, split, folder) for split in (task.train, task.validation))
        if recipe.model.kind == "classification":
            prepared[name] = _classification(name, task, recipe, tokenizer, train, validation)
        else:
            prepared[name] = _text(name, task, recipe, tokenizer, train, validation)
    heads = {name: task.head for name, task in prepared.items() if task.head is not None}
    if heads:
        check_heads(heads)
    return prepared


def read_split(name: str, task: TaskSection, split: str | list[str], folder: Path) -> Dataset:
    """Read one split of a task, from files or from the Hub.

    Args:
        name: The task's, for messages.
        task: Its section.
        split: A split of `task.source`, or files; "train[:80%]" cuts.
        folder: Where relative paths start.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is empty.
    """
    names, cut = ([split], "") if isinstance(split, str) else (split, "")
    if isinstance(split, str) and (match := re.fullmatch(r"(.*?)(\[[^\]]*\])", split)):
        names, cut = [match[1]], match[2]
    files = _files(name, task, names, folder)
    if files is None:
        try:
            dataset = load_dataset(task.source, task.subset, split="+".join(names) + cut)
        except Exception as error:
            raise FileNotFoundError(
                f"Task {name!r}: {task.source!r} is no folder here, and as a Hub dataset it cannot be read: {error}"
            ) from error
    else:
        reader = {READERS[file.suffix] for file in files}
        if len(reader) > 1:
            raise ValueError(f"Task {name!r}: files of several kinds in one split: {[file.name for file in files]}.")
        options = {"sep": "\t"} if files[0].suffix == ".tsv" else {}
        data_files = [glob.escape(str(file)) for file in files]  # datasets takes them for patterns
        try:
            dataset = load_dataset(reader.pop(), data_files=data_files, split=f"train{cut}", **options)
        except Exception as error:
            # A damaged file, or a cut of nothing; datasets says which.
            cause = error.__cause__ or error
            raise ValueError(f"Task {name!r}: the split {split!r} cannot be read: {cause}") from error
    if len(dataset) == 0:
        raise ValueError(f"Task {name!r}: the split {split!r} has no examples.")
    return dataset if task.limit is None else dataset.select(range(min(task.limit, len(dataset))))


def _files(name: str, task: TaskSection, names: list[str], folder: Path) -> list[Path] | None:
    # None: not files but a Hub dataset.
    root = folder if task.source is None else folder / task.source
    if task.source is not None and not root.exists():
        if task.source.startswith((".", "/", "~")) or Path(task.source).suffix in READERS:
            raise FileNotFoundError(f"Task {name!r}: source {root} is not there.")
        return None
    if root.is_file():
        raise ValueError(f"Task {name!r}: source {root} is a file. Name files under train and validation instead.")
    found = []
    for wanted in names:
        # Path.glob knows no absolute patterns: the folder is taken as it is named.
        absolute = Path(wanted).is_absolute()
        place, pattern = (Path(wanted).parent, Path(wanted).name) if absolute else (root, wanted)
        try:
            if (place / pattern).is_file() and Path(pattern).suffix in READERS:
                matches = [place / pattern]
            else:
                matches = sorted(place.glob(pattern)) if Path(pattern).suffix in READERS else []
                matches += sorted(place.glob(f"{pattern}[.-]*"))
                matches = [file for file in matches if file.suffix in READERS and file.is_file()]
        except (ValueError, NotImplementedError, OSError) as error:
            raise ValueError(f"Task {name!r}: {wanted!r} is no name or pattern of a file: {error}.") from error
        if not matches:
            there = sorted(file.name for file in root.iterdir() if file.suffix in READERS)
            hint = nearest(wanted, there)
            raise FileNotFoundError(f"Task {name!r}: {root} holds no file for {wanted!r}; it holds {there}.{hint}")
        found += matches
    return found


def _fill(name: str, index: int, template: str, row: dict[str, Any]) -> str:
    if empty := [column for column in template_columns(template) if row[column] is None]:
        raise ValueError(f"Task {name!r}, row {index}: column {empty[0]!r} is empty (null).")
    # Not str.format, to which a column named 0 is a place in a list.
    parts = string.Formatter().parse(template)
    return "".join(text if column is None else f"{text}{row[column]}" for text, column, _, _ in parts)


def _check_columns(name: str, templates: list[str], dataset: Dataset, also: list[str]) -> None:
    for column in [*(c for template in templates for c in template_columns(template)), *also]:
        if column not in dataset.column_names:
            raise ValueError(
                f"Task {name!r}: no column {column!r}; the data has {dataset.column_names}."
                f"{nearest(column, dataset.column_names)}"
            )


def _classification(
    name: str, task: TaskSection, recipe: Recipe, tokenizer: Any, train: Dataset, validation: Dataset
) -> PreparedTask:
    templates = task.templates("classification")
    for dataset in (train, validation):
        _check_columns(name, templates, dataset, [task.label])
    spec = _head(name, task, train)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        texts = [_fill(name, index, template, row) for template in templates]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=recipe.model.max_length))
        if not encoded["input_ids"]:
            raise ValueError(f"Task {name!r}, row {index}: nothing but padding; {templates} give {texts}.")
        return encoded | {"labels": _label(name, index, row[task.label], spec)}

    tokenised = _map(train, convert)
    shown = [
        " ‖ ".join(_fill(name, i, template, train[i]) for template in templates)
        + f"  →  {_shown_label(train[i][task.label], spec)}"
        for i in range(min(3, len(train)))
    ]
    return PreparedTask(tokenised, _map(validation, convert), spec, shown, _cut(tokenised, recipe.model.max_length))


def _head(name: str, task: TaskSection, train: Dataset) -> HeadSpec:
    values = [value for value in train[task.label] if value is not None and value != -1]
    if not values:
        raise ValueError(f"Task {name!r}: column {task.label!r} of the training data holds no labels.")
    if task.regression:
        if not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"Task {name!r}: regression needs numbers; {task.label!r} holds {values[0]!r}.")
        return regression_spec(values, task.head)
    feature = train.features[task.label]
    if task.labels is not None:
        return HeadSpec(labels=task.labels, head=task.head)
    if isinstance(feature, ClassLabel):
        return HeadSpec(labels=list(feature.names), head=task.head)
    kinds = sorted(set(values))
    if isinstance(values[0], float) or len(kinds) > 100:
        raise ValueError(
            f"Task {name!r}: {task.label!r} holds {len(kinds)} different values, such as {kinds[0]!r}. "
            "For numbers set regression: true; for classes name them under labels."
        )
    if isinstance(values[0], int):
        return HeadSpec(labels=[str(i) for i in range(max(2, kinds[-1] + 1))], head=task.head)
    return HeadSpec(labels=[str(kind) for kind in kinds], head=task.head)


def _label(name: str, index: int, value: Any, spec: HeadSpec) -> int | float:
    if value is None or (spec.labels is not None and value == -1):
        raise ValueError(f"Task {name!r}, row {index} has no label.")
    if spec.labels is None:
        return float(value)
    if isinstance(value, str) and value in spec.labels:
        return spec.labels.index(value)
    if isinstance(value, (int, bool)) and 0 <= int(value) < len(spec.labels):
        return int(value)
    raise ValueError(
        f"Task {name!r}, row {index}: label {value!r} is none of {spec.labels}"
        f"{'' if isinstance(value, str) else f' (0…{len(spec.labels) - 1})'}.{nearest(str(value), spec.labels)}"
    )


def _shown_label(value: Any, spec: HeadSpec) -> str:
    return str(value) if spec.labels is None or isinstance(value, str) else spec.labels[int(value)]


def _text(
    name: str, task: TaskSection, recipe: Recipe, tokenizer: Any, train: Dataset, validation: Dataset
) -> PreparedTask:
    templates = task.templates(recipe.model.kind)
    for dataset in (train, validation):
        _check_columns(name, templates, dataset, [])
    feature = train.features.get(task.label)
    names = task.labels or (list(feature.names) if isinstance(feature, ClassLabel) else None)
    encode = _causal if recipe.model.kind == "causal" else _seq2seq
    longest = recipe.model.max_length

    def render(row: dict[str, Any], index: int) -> list[str]:
        if names and isinstance(row.get(task.label), int):
            row = row | {task.label: names[int(_label(name, index, row[task.label], HeadSpec(labels=names)))]}
        return [_fill(name, index, template, row) for template in templates]

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, target = render(row, index)
        if not target.strip():
            raise ValueError(f"Task {name!r}, row {index}: the target {templates[1]!r} is empty.")
        return encode(tokenizer, prompt, target, longest)

    tokenised = _map(train, convert)
    shown = ["  →  ".join(render(train[i], i)) for i in range(min(3, len(train)))]
    return PreparedTask(tokenised, _map(validation, convert), None, shown, _cut(tokenised, longest))


def _causal(tokenizer: Any, prompt: str, target: str, longest: int) -> dict[str, Any]:
    # The prompt is cut at its beginning, so that the target, which is learnt, stays.
    before = tokenizer(prompt).input_ids
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    after = tokenizer(target, add_special_tokens=False).input_ids
    after = [*after, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else after
    after = after[: longest - 1]
    before = before[max(0, len(before) + len(after) - longest) :]
    ids = [*before, *after]
    # A causal loss predicts nothing at the first position: an empty prompt loses the first token of the target.
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(before) + after}


def _seq2seq(tokenizer: Any, prompt: str, target: str, longest: int) -> dict[str, Any]:
    encoded = tokenizer(prompt, text_target=target, truncation=True, max_length=longest)
    return {key: encoded[key] for key in ("input_ids", "attention_mask", "labels")}


def _map(dataset: Dataset, convert: Callable[[dict[str, Any], int], dict[str, Any]]) -> Dataset:
    # Not cached: a closure's fingerprint is not reliable, and a wrong cache is worse than a slow start.
    return dataset.map(
        convert, with_indices=True, remove_columns=dataset.column_names, load_from_cache_file=False, desc="Tokenising"
    )


def _cut(dataset: Dataset, longest: int) -> float:
    return sum(len(row) >= longest for row in dataset["input_ids"]) / len(dataset)
