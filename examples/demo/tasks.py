"""The demo's four tasks, made of docstrings.

Labels are right by construction, and guessing one class earns nothing: the three yes-or-no tasks are half and half,
and the held-out examples of the areas are equally many.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from .corpus import AREAS, Docstring

SHORTEST, LONGEST = 6, 28  # words of a sentence
MOVED = 0.5  # share of a sentence's words that are shuffled

TASKS: dict[str, tuple[str, ...]] = {
    "word order": ("intact", "shuffled"),
    "signature": ("of another function", "of this function"),
    "area": tuple(AREAS),
    "next sentence": ("from elsewhere", "follows"),
}
"""The tasks in the order of their ids, and the meaning of their labels."""


class Example(NamedTuple):
    """A text or a pair of texts with its label, an index into `TASKS[task]`; `module` is where the first comes from."""

    task: str
    text: str
    pair: str | None
    label: int
    module: str


def make_examples(docstrings: list[Docstring], size: int, seed: int) -> dict[str, list[Example]]:
    """Make the examples of every task; the same arguments give the same ones.

    Args:
        docstrings: Those of one part, training or held out.
        size: Examples a task, a multiple of twice the number of areas. Training has over 2,900 for every task but
            "area"; of an area with fewer than size / 8 docstrings all are taken.
        seed: Of the draw.

    Returns:
        The examples by task, in a random order.

    Raises:
        ValueError: The size is no such multiple, or there are not so many.

    Example:
        >>> from demo.corpus import mine_docstrings
        >>> held_out = [docstring for docstring in mine_docstrings() if docstring.held_out]
        >>> len(make_examples(held_out, size=32, seed=0)["area"])
        32
    """
    if size < 1 or size % (2 * len(AREAS)):
        raise ValueError(f"size={size}: expected a multiple of {2 * len(AREAS)}, so that the classes are equally many.")
    makers = (_word_order, _signature, _area, _next_sentence)
    examples = {}
    for task, make in zip(TASKS, makers, strict=True):
        rng = random.Random(f"{seed} {task}")
        examples[task] = make(docstrings, size, rng)
        rng.shuffle(examples[task])
    return examples


def _word_order(docstrings: list[Docstring], size: int, rng: random.Random) -> list[Example]:
    plain = {text: docstring.module for docstring in docstrings for text in docstring.sentences() if _is_plain(text)}
    chosen = _sample(list(plain.items()), size, rng, "word order")
    intact = [Example("word order", text, None, 0, module) for text, module in chosen[::2]]
    return intact + [Example("word order", shuffle_words(text, rng), None, 1, module) for text, module in chosen[1::2]]


def shuffle_words(sentence: str, rng: random.Random) -> str:
    """Shuffle `MOVED` of the words, three at least, and leave the closing mark where it is.

    Example:
        >>> shuffle_words("Return the name of the file.", random.Random(0))
        'Return name the of the file.'
    """
    words = sentence[:-1].split()
    shuffled = words
    while shuffled == words:
        places = rng.sample(range(len(words)), max(3, round(MOVED * len(words))))
        shuffled = list(words)
        for place, source in zip(places, rng.sample(places, len(places)), strict=True):
            shuffled[place] = words[source]
    return " ".join(shuffled) + sentence[-1]


def _signature(docstrings: list[Docstring], size: int, rng: random.Random) -> list[Example]:
    functions = [docstring for docstring in docstrings if docstring.signature]
    chosen = _sample(functions, size, rng, "signature")
    examples = [Example("signature", each.signature, each.paragraphs[0], 1, each.module) for each in chosen[::2]]
    for each in chosen[1::2]:
        other = rng.choice(functions)
        while other.name == each.name or other.paragraphs[0] == each.paragraphs[0]:
            other = rng.choice(functions)
        examples.append(Example("signature", each.signature, other.paragraphs[0], 0, each.module))
    return examples


def _area(docstrings: list[Docstring], size: int, rng: random.Random) -> list[Example]:
    examples = []
    for label, area in enumerate(AREAS):
        known = [docstring for docstring in docstrings if docstring.area == area]
        for each in rng.sample(known, min(len(known), size // len(AREAS))):
            examples.append(Example("area", " ".join(each.paragraphs), None, label, each.module))
    return examples


def _next_sentence(docstrings: list[Docstring], size: int, rng: random.Random) -> list[Example]:
    neighbours = []
    for docstring in docstrings:
        run = docstring.sentences()
        neighbours += [(docstring.module, *pair) for pair in itertools.pairwise(run) if all(map(_is_plain, pair))]
    chosen = _sample(neighbours, size, rng, "next sentence")
    examples = [Example("next sentence", first, second, 1, module) for module, first, second in chosen[::2]]
    for module, first, _ in chosen[1::2]:
        elsewhere, _, second = rng.choice(neighbours)
        while elsewhere == module:
            elsewhere, _, second = rng.choice(neighbours)
        examples.append(Example("next sentence", first, second, 0, module))
    return examples


def _is_plain(sentence: str) -> bool:
    return SHORTEST <= len(sentence.split()) <= LONGEST and sentence[-1] in ".!?:"


def _sample(population: list, size: int, rng: random.Random, task: str) -> list:
    if len(population) < size:
        raise ValueError(f"{task}: found {len(population)} texts, asked for {size} examples; ask for fewer.")
    return rng.sample(population, size)
