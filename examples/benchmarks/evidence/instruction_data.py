"""Ten unlike text-to-text tasks: questions with one answer each, for `instructions`.

Translations of software messages (`catalogues.py`), arithmetic and strings made here, and GLUE's sentences as
questions. A question belongs to one split by its words, whatever the task; a message's translations stay together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from catalogues import Messages
from language_data import split_of

TRANSLATIONS = ("German", "Spanish", "Russian", "Turkish")
SIZES = {"train": 500, "development": 40, "test": 100}
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Pair = tuple[str, str, str]
"""(question, answer, text that decides on the split)."""


@dataclasses.dataclass
class Question:
    """A question, its answer and the number of its task."""

    text: str
    answer: str
    task: int


@dataclasses.dataclass
class Questions:
    """The splits, and the tasks in the order of their numbers."""

    splits: dict[str, list[Question]]
    tasks: list[str]

    @property
    def digest(self) -> str:
        """Short text that is another where any question is."""
        held = {name: [dataclasses.astuple(each) for each in own] for name, own in self.splits.items()}
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12]


def build(
    messages: dict[str, Messages],
    rows: Callable[[str], list[dict[str, Any]]],
    fits: Callable[[str, str], bool],
    sizes: dict[str, int] = SIZES,
) -> Questions:
    """Make the splits.

    Args:
        messages: Language to {English message: translation}, those of `TRANSLATIONS` at least.
        rows: Gives the rows of a GLUE task.
        fits: Whether a question and its answer are short enough.
        sizes: Questions a task by split.

    Raises:
        ValueError: A task has too few questions.
    """
    sources: dict[str, Iterator[Pair]] = {
        **{f"to {language}": _translations(language, messages[language]) for language in TRANSLATIONS},
        "add": _sums("+"),
        "subtract": _sums("-"),
        "reverse": _words("Write the word backwards", lambda word: word[::-1]),
        "sort": _words("Sort the letters of the word", lambda word: "".join(sorted(word))),
        **{task: _glue(task, rows(task)) for task in GLUE},
    }
    splits: dict[str, list[Question]] = {name: [] for name in sizes}
    for number, (task, source) in enumerate(sources.items()):
        own: dict[str, list[Question]] = {name: [] for name in sizes}
        seen: set[str] = set()
        for text, answer, deciding in source:
            wanted = own[split_of(deciding)]
            if text not in seen and len(wanted) < sizes[split_of(deciding)] and fits(text, answer):
                seen.add(text)
                wanted.append(Question(text, answer, number))
            if all(len(own[name]) == size for name, size in sizes.items()):
                break
        for name, size in sizes.items():
            if len(own[name]) < size:
                raise ValueError(f"{task} has {len(own[name])} questions for {name}, {size} are needed.")
            splits[name] += own[name]
    return Questions(splits, list(sources))


def _translations(language: str, messages: Messages) -> Iterator[Pair]:
    texts = sorted(messages, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    for text in texts:
        if messages[text] != text:
            yield f"Translate into {language}: {text}", messages[text], text


def _sums(sign: str) -> Iterator[Pair]:
    draw = random.Random(f"sums {sign}")
    for _ in range(100_000):
        a, b = draw.randrange(1000), draw.randrange(1000)
        question = f"How much is {a} {sign} {b}?"
        # Digits are no words, so the numbers are spelt as letters to decide on the split.
        letters = "".join(LETTERS[int(digit)] for digit in f"{a:03}{b:03}")
        yield question, str(a + b if sign == "+" else a - b), letters


def _words(task: str, answer: Callable[[str], str]) -> Iterator[Pair]:
    draw = random.Random("words")
    for _ in range(100_000):
        word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 6)))
        yield f"{task}: {word}", answer(word), word


def _glue(task: str, rows: list[dict[str, Any]]) -> Iterator[Pair]:
    question, answers = GLUE[task]
    order = list(range(len(rows)))
    random.Random(task).shuffle(order)
    for place in order:
        row = rows[place]
        yield (
            question.format(**row),
            answers[row["label"]],
            " ".join(str(row[name]) for name in sorted(row) if name != "idx"),
        )


GLUE: dict[str, tuple[str, tuple[str, ...]]] = {
    "cola": ("Is this sentence acceptable English? {sentence}", ("no", "yes")),
    "mrpc": ("Do these say the same? 1. {sentence1} 2. {sentence2}", ("no", "yes")),
    "rte": ("{sentence1} Does it follow that: {sentence2}", ("yes", "no")),
}
"""The tasks whose training file the small folder has: (question, answers by label)."""


def glue_rows(folder: Path | None) -> Callable[[str], list[dict[str, Any]]]:
    """Return a function that reads a task's training rows from `<folder>/<task>/train*.parquet`, or from the Hub."""

    def rows(task: str) -> list[dict[str, Any]]:
        if folder is None:
            import datasets

            return datasets.load_dataset("nyu-mll/glue", task, split="train").to_list()
        import pyarrow.parquet

        files = sorted((folder / task).glob("train*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"{folder / task} holds no train.parquet. Leave --glue out to load it from the Hub."
            )
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]

    return rows
