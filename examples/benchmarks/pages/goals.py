"""The goals that the library set itself, each beside what was measured: met, or missed by how much.

Overheads are relative to PEFT LoRA's of the same rank, see docs/performance.md. A goal over several sizes is judged by
the worst of them, which is named: missed where a whole range lies beyond the bound, met where none reaches over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Results = dict[str, dict[str, Any]]


class Measured(NamedTuple):
    """What was measured at one size: the value and its range, see `measure.overheads`."""

    where: str
    value: float
    low: float
    high: float


Found = Iterator[Measured]


class Goal(NamedTuple):
    """A goal.

    Attributes:
        text: What is asked.
        limit: The bound.
        of: Reads what was measured from the results by name.
        at_least: The bound is a lower one.
    """

    text: str
    limit: float
    of: Callable[[Results], Found]
    at_least: bool = False


def _rows(results: Results, name: str) -> list[dict[str, Any]]:
    return results[name]["rows"] if name in results else []


def _sizes(results: Results, dtype: str, low: int = 0, high: int = 2**30) -> Iterator[tuple[str, dict[str, Any]]]:
    # Of one layer, from 512 tokens on and widths from low to high.
    for row in _rows(results, "layer"):
        if row["tokens"] >= 512 and row["dtype"] == dtype and low <= row["width"] <= high:
            yield f"{row['tokens']} tokens, d = {row['width']}, {dtype}", row


def _ratio(where: str, found: dict[str, Any], kind: str) -> Measured:
    return Measured(where, found["value"][kind], *found["range"][kind])


def overhead(kind: str, dtypes: tuple[str, ...] = ("float32",), low: int = 0, high: int = 2**30) -> Callable:
    """Read a kind's overhead."""
    return lambda results: (
        _ratio(where, row["overhead"], kind)
        for dtype in dtypes
        for where, row in _sizes(results, dtype, low, high)
        if kind in row["overhead"]["value"]
    )


def memory(key: str, kind: str, against: str, dtype: str = "float32") -> Callable[[Results], Found]:
    """Read a kind's bytes as a share of another's."""
    return lambda results: (
        Measured(where, *[row[key][kind] / row[key][against]] * 3)
        for where, row in _sizes(results, dtype)
        if kind in row[key] and against in row[key]
    )


def faster(kind: str) -> Callable[[Results], Found]:
    """Read the published algorithm's overhead as a multiple of a kind's; of one that is lost in the noise, any."""

    def times_ours(published: float, ours: float) -> float:
        return published / ours if ours > 0 else float("inf")

    def found(results: Results) -> Found:
        for dtype in BOTH:
            for where, row in _sizes(results, dtype):
                if {"published", kind} <= set(row["overhead"]["value"]):
                    theirs, ours = (_ratio(where, row["overhead"], each) for each in ("published", kind))
                    value = times_ours(theirs.value, ours.value)
                    yield Measured(where, value, times_ours(theirs.low, ours.high), times_ours(theirs.high, ours.low))

    return found


def total(name: str, kind: str, **wanted: Any) -> Callable[[Results], Found]:
    """Read a kind's time as a share of its reference's."""

    def found(results: Results) -> Found:
        for row in _rows(results, name):
            if all(row.get(key) == value for key, value in wanted.items()) and kind in row["times"]:
                described = ", ".join(f"{row[key]} {key}" for key in ("layers", "batch", "tokens") if key in row)
                yield _ratio(described, row["total"], kind)

    return found


def speed(name: str, kind: str) -> Callable[[Results], Found]:
    """Read a kind's speed as a share of its reference's."""
    return lambda results: (
        Measured(found.where, 1 / found.value, 1 / found.high, 1 / found.low) for found in total(name, kind)(results)
    )


def on_gpu(of: str, kind: str, **wanted: Any) -> Callable[[Results], Found]:
    """Read a kind's overhead from gpu.py's results, those of CUDA graphs."""

    def found(results: Results) -> Found:
        for row in _rows(results, "gpu"):
            if row["of"] == of and not row["eager"] and all(row[key] == value for key, value in wanted.items()):
                yield _ratio(f"{row['tokens']} tokens, d = {row['width']}, {row['dtype']}", row["overhead"], kind)

    return found


BOTH = ("float32", "bfloat16")
LARGE = {"tokens": 8192, "width": 4096, "dtype": "bfloat16"}
GOALS = [
    Goal("CPU float32, 512 tokens and more, d ≥ 2,048, PyTorch: overhead", 0.85, overhead("smora", low=2048)),
    Goal("the same with the native kernel", 0.85, overhead("smora native", low=2048)),
    Goal("CPU float32, 512 tokens and more, d = 768, PyTorch: overhead", 1.0, overhead("smora", high=768)),
    Goal("the same with the native kernel", 1.0, overhead("smora native", high=768)),
    Goal("CPU bfloat16, 512 tokens and more, PyTorch: overhead", 1.0, overhead("smora", ("bfloat16",))),
    Goal("the same with the native kernel", 1.0, overhead("smora native", ("bfloat16",))),
    Goal("CPU decoding, PyTorch: tokens a second, over LoRA's", 1.0, speed("decode", "smora"), at_least=True),
    Goal("the same with the native kernel", 1.0, speed("decode", "smora native"), at_least=True),
    Goal("GPU training, 8,192 tokens, d = 4,096, bfloat16: overhead", 0.6, on_gpu("training", "smora", **LARGE)),
    Goal("GPU decoding in a CUDA graph: overhead", 0.5, on_gpu("decoding", "smora")),
    Goal("saved for backward beyond x, float32, over LoRA's", 0.28, memory("saved_bytes", "smora", "lora64")),
    Goal("the same in bfloat16", 0.28, memory("saved_bytes", "smora", "lora64", "bfloat16")),
    Goal("peak memory of a layer's step, float32, over LoRA's", 0.70, memory("peak_bytes", "smora", "lora64")),
    Goal("published algorithm's overhead over ours, PyTorch", 10, faster("smora"), at_least=True),
    Goal("the same with the native kernel", 10, faster("smora native"), at_least=True),
    Goal(
        "what the published algorithm saves over what we save",
        500,
        memory("saved_bytes", "published", "smora"),
        at_least=True,
    ),
    Goal("task gate, mixed tasks: overhead over LoRA r = 8's", 0.7, overhead("more8 mixed", BOTH)),
    Goal("the same with the native kernel", 0.7, overhead("more8 mixed native", BOTH)),
    Goal("task gate, one task in the batch: overhead over LoRA r = 8's", 0.6, overhead("more8 one task", BOTH)),
    Goal("the same with the native kernel", 0.6, overhead("more8 one task native", BOTH)),
    Goal(
        "training step, Llama-shaped, float32, PyTorch: time over LoRA's",
        1.0,
        total("training_step", "smora", shape="llama"),
    ),
    Goal("the same with the native kernel", 1.0, total("training_step", "smora native", shape="llama")),
    Goal("adapting a 7-billion-parameter model: time over LoRA's", 1.0, total("loading", "smora", of="adapting")),
    Goal("loading onto it: time over LoRA's", 1.0, total("loading", "smora", of="loading")),
    Goal("importing, over importing peft", 1.05, total("loading", "rank_experts", of="importing")),
]


def verdicts(results: Results) -> list[list[str]]:
    """Judge every goal: [what, goal, measured, verdict] for each."""
    lines = []
    for goal in GOALS:
        found = list(goal.of(results))
        bound = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"
        if not found:
            lines.append([goal.text, bound, "not measured", ""])
            continue
        worst, said = verdict(goal, found)
        best = (max if goal.at_least else min)(each.value for each in found)
        between = f"{worst.low:.3g} – {worst.high:.3g}" if worst.low < worst.high else ""
        described = f"{worst.value:.3g} ({', '.join(filter(None, (worst.where, between)))})"
        described += f"; best {best:.3g}" if len(found) > 1 else ""
        lines.append([goal.text, bound, described, said])
    return lines


def verdict(goal: Goal, found: list[Measured]) -> tuple[Measured, str]:
    """Return the size that decides, and whether all ranges keep to the bound, or one lies wholly beyond it."""

    def beyond(edge: float) -> float:
        return goal.limit - edge if goal.at_least else edge - goal.limit

    surest = max(found, key=lambda each: min(beyond(each.low), beyond(each.high)))
    if min(beyond(surest.low), beyond(surest.high)) > 0:
        return surest, f"missed by {beyond(surest.value):.2g}"
    farthest = max(found, key=lambda each: max(beyond(each.low), beyond(each.high)))
    return farthest, "met" if max(beyond(farthest.low), beyond(farthest.high)) <= 0 else "undecided"
