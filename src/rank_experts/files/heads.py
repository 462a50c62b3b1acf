"""The heads beside an adapter, `heads.json` and `heads.safetensors`: what they predict, and reading them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..storage.pair import PairNames, check_tensor, parse_weights, read_pair, read_weights

HEADS_CONFIG = "heads.json"
HEADS_FILES = PairNames(HEADS_CONFIG, "heads.safetensors")
POOLINGS = ("mean", "first", "last")


@dataclass
class HeadSpec:
    """What a task's head predicts.

    Args:
        labels: Names of the classes in the order of their numbers; None: the labels are numbers (regression).
        head: Name of the head, for tasks that share one; None: the task's own.
        offset: Regression: subtracted from labels, and `scale` divides them, before the squared error; predictions
            are in the labels' own units.
        scale: Regression, see `offset`.

    Example:
        >>> HeadSpec(labels=["no", "yes"]).width
        2
    """

    labels: list[str] | None = None
    head: str | None = None
    offset: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return 1 if self.labels is None else len(self.labels)


def check_heads(heads: Mapping[str, HeadSpec]) -> None:
    """Check that heads have labels and that tasks which share a head agree on them.

    Raises:
        ValueError: No head, fewer than two classes, a class named twice, or label sets that clash in one head.
    """
    if not heads:
        raise ValueError("heads is empty: expected {task: HeadSpec(...)}.")
    first: dict[str, str] = {}
    for task, spec in heads.items():
        if spec.labels is not None and (len(spec.labels) < 2 or len(set(spec.labels)) < len(spec.labels)):
            raise ValueError(f"Task {task!r}: labels {spec.labels}: expected at least two, each once.")
        if not spec.scale > 0:
            raise ValueError(f"Task {task!r}: scale={spec.scale}: expected more than 0.")
        owner = first.setdefault(spec.head or task, task)
        if asdict(heads[owner]) | {"head": None} != asdict(spec) | {"head": None}:
            raise ValueError(
                f"Tasks {owner!r} and {task!r} share the head {spec.head or task!r} and their labels clash: "
                f"{_described(heads[owner])} and {_described(spec)}. Give each a head of its own, or the same labels."
            )


def _described(spec: HeadSpec) -> str:
    numbers = f"numbers (offset {spec.offset:g}, scale {spec.scale:g})"
    return numbers if spec.labels is None else str(spec.labels)


def read_heads(path: str | os.PathLike[str]) -> tuple[dict[str, HeadSpec], str]:
    """Return the heads' specs and the pooling that `save_heads` wrote.

    Raises:
        FileNotFoundError: The folder holds no heads.
        ValueError: A file is damaged, or lies outside of the folder.
    """
    return read_heads_and_weights(Path(path))[:2]


def read_heads_and_weights(folder: Path) -> tuple[dict[str, HeadSpec], str, dict[str, Tensor]]:
    """Return the heads' specs, the pooling, and the tensors by name; raises as `read_heads`."""
    # Checked against each other, so that what is allocated for them is no more than what the files hold.
    pair = read_pair(folder, names=HEADS_FILES)
    file = folder / HEADS_CONFIG
    try:
        description = json.loads(pair.config)
        specs = {task: HeadSpec(**spec) for task, spec in description["heads"].items()}
        for task, spec in specs.items():
            _check_spec(task, spec)
        check_heads(specs)
        if (pooling := description["pooling"]) not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: expected 'mean', 'first' or 'last'")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from None
    weights = read_weights(folder, name=HEADS_FILES.weights) if pair.weights is None else pair.weights
    tensors = parse_weights(folder / HEADS_FILES.weights, weights)
    widths = {head_key(spec.head or task): spec.width for task, spec in specs.items()}
    expected = {f"{key}.{leaf}" for key in widths for leaf in ("weight", "bias")}
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(f"{folder / HEADS_FILES.weights} does not fit {file}: {differing[0]} is in one of them alone.")
    for name, tensor in tensors.items():
        key, _, leaf = name.rpartition(".")
        inputs = tuple(tensor.shape[1:]) if leaf == "weight" and tensor.dim() == 2 else (0,)
        shape = (widths[key], *inputs) if leaf == "weight" else (widths[key],)
        check_tensor(f"{folder / HEADS_FILES.weights}: {name}", tensor, shape)
    return specs, pooling, tensors


def _check_spec(task: str, spec: HeadSpec) -> None:
    labels = spec.labels
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise TypeError(f"task {task!r}: labels={labels!r}: expected a list of names, or null")
    if spec.head is not None and not isinstance(spec.head, str):
        raise TypeError(f"task {task!r}: head={spec.head!r}: expected a name, or null")
    for name in ("offset", "scale"):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError(f"task {task!r}: {name}={value!r}: expected a number")


def check_fit(folder: Path, tensors: dict[str, Tensor], width: int) -> None:
    """Check that heads' tensors take the `width` inputs that an encoder gives; a ValueError says what differs."""
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] != width:
            raise ValueError(
                f"{folder / HEADS_FILES.weights} does not fit the encoder: {name} takes {tensor.shape[1]} inputs, the "
                f"encoder gives {width}. Is this the model that the heads were trained on?"
            )


def head_key(name: str) -> str:
    """Return a head's key in a `ModuleDict`."""
    # ModuleDict's keys may hold no dot and may not be named as one of its methods; no two names have one key.
    return "head_" + name.replace("%", "%25").replace(".", "%2E")
