"""Eight tasks that conflict: the first word of an English message's translation, behind one shared output.

The input is "German: Could not open the file", the answer the number of the translation's first word ("konnte" → 7)
among the 32 words that most often come first in that language. A class thus means another word in each language, and
one input text has another answer in each. An English text belongs to one split, whatever the language, and so does
every text that has the same words.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from catalogues import Messages

CLASSES = 32
SPLITS = {"train": 0.75, "development": 0.10, "test": 0.15}
SIZES = {"train": 1500, "development": 175, "test": 300}
"""Examples a language, the same for all, so that none counts more."""
MAX_TOKENS = 24

_PLACEHOLDER = re.compile(r"\{[^{}]*\}|%\([^)]*\)\w|%\w|<[^<>]*>")


@dataclasses.dataclass
class Examples:
    """One split: what the encoder reads, the language's number and the answer's."""

    texts: list[str]
    languages: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass
class Data:
    """The splits, the languages in the order of their numbers, each one's words in the order of theirs."""

    splits: dict[str, Examples]
    languages: list[str]
    words: dict[str, list[str]]

    @property
    def digest(self) -> str:
        """Short text that is another where any example is."""
        held = {name: [s.texts, s.languages.tolist(), s.labels.tolist()] for name, s in self.splits.items()}
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12]


def words_of(text: str) -> list[str]:
    """Return a text's words in small letters, without digits, signs, placeholders and markup.

    Example:
        >>> words_of("L'entité {name} n’existe <b>pas</b>.")
        ['l', 'entité', 'n', 'existe', 'pas']
    """
    # A small İ is an i and a dot of its own, which is no letter.
    small = unicodedata.normalize("NFC", _PLACEHOLDER.sub(" ", text)).lower().replace("\u0307", "")
    return re.findall(r"[^\W\d_]+", small)


def split_of(text: str) -> str:
    """Return an English text's split, by a hash of its words: "Save as…" and "save as" never part."""
    draw = int(_hash(" ".join(words_of(text))), 16) / 16**64
    for name, share in SPLITS.items():
        if draw < share:
            return name
        draw -= share
    return name


def build(messages: dict[str, Messages], fits: Sequence[str] | None = None, sizes: dict[str, int] = SIZES) -> Data:
    """Make the splits.

    Args:
        messages: Language to {English message: translation}.
        fits: The English messages to use; None: all.
        sizes: Examples a language by split.

    Raises:
        ValueError: A language has too few messages.
    """
    usable = None if fits is None else set(fits)
    languages = list(messages)
    rows: dict[str, list[tuple[str, int, int]]] = {name: [] for name in SPLITS}
    words = {}
    for number, language in enumerate(languages):
        own: dict[str, list[tuple[str, str]]] = {name: [] for name in SPLITS}
        seen: set[str] = set()
        for text, translation in messages[language].items():
            first, normal = words_of(translation)[:1], " ".join(words_of(text))
            if first and normal and normal not in seen and (usable is None or text in usable):
                seen.add(normal)
                own[split_of(text)].append((text, first[0]))
        counts = collections.Counter(word for _, word in own["train"])
        # By frequency, equals by the alphabet: the same numbers on every machine.
        words[language] = sorted(counts, key=lambda word: (-counts[word], word))[:CLASSES]
        numbers = {word: place for place, word in enumerate(words[language])}
        for name, pairs in own.items():
            known = [(text, numbers[word]) for text, word in pairs if word in numbers]
            known.sort(key=lambda pair: _hash(f"order {pair[0]}"))
            if len(known) < sizes[name]:
                raise ValueError(f"{language} has {len(known)} messages for {name}, {sizes[name]} are needed.")
            rows[name] += [(text, number, label) for text, label in known[: sizes[name]]]
    splits = {}
    for name, found in rows.items():
        texts, numbers_, labels = (list(column) for column in zip(*found))
        splits[name] = Examples(texts, torch.tensor(numbers_), torch.tensor(labels))
    return Data(splits, languages, words)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
