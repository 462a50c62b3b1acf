"""How the benchmarks measure: variants in turn, medians with their range, bytes, and what machine it was.

Run the benchmarks with the allocator settings of `make bench`: glibc maps tensors of 32 MiB and more anew each time,
which costs more than what is measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
MOST_ROUNDS = 200
Rounds = dict[str, list[float]]
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def in_turn(
    variants: dict[str, Callable[[], Any]],
    repeats: int,
    clock: str = "wall",
    warm_up: int = 3,
    seconds: float = 0.0,
    seldom: Collection[str] = (),
) -> Rounds:
    """Time variants A B C A B C …, so that whatever drifts on the machine drifts for all of them.

    Args:
        variants: Name to what is timed.
        repeats: At least so many rounds.
        clock: "wall", or "cpu": the calling thread's own time, for a machine that others use too (one thread only).
        warm_up: Rounds before.
        seconds: Go on for so long, up to `MOST_ROUNDS`.
        seldom: Variants that take long and need no close look: run in every fourth round.

    Returns:
        Name to the milliseconds of each round, NaN where the variant did not run.
    """
    now = CLOCKS[clock]
    times: Rounds = {name: [] for name in variants}
    begin, turn = time.perf_counter(), -warm_up
    while turn < repeats or (turn < MOST_ROUNDS and time.perf_counter() - begin < seconds):
        for name, run in variants.items():
            if name in seldom and turn % 4 and turn != -1:
                spent = math.nan
            else:
                start = now()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent = (now() - start) * 1e3
            if turn >= 0:
                times[name].append(spent)
        turn += 1
    return times


def spread(times: Rounds) -> dict[str, dict[str, float]]:
    """Return each variant's median and quartiles in milliseconds."""
    found = {}
    for name, values in times.items():
        low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75]).tolist()
        found[name] = {"median_ms": round(middle, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}
    return found


def overheads(times: Rounds, against: Callable[[str], str], base: str | None = "base") -> dict[str, Any]:
    """Return (variant − base) / (reference − base) for each variant, by the medians of the rounds' differences.

    Differences within a round leave out what changes on the machine from round to round, which is more than what an
    adapter costs where the frozen layer takes most of the time.

    Args:
        times: From `in_turn`.
        against: Gives a variant's reference.
        base: What is subtracted; None: nothing, so that it is the total.

    Returns:
        "value": name to the ratio; "range": name to the interval that holds it in 90 of 100 draws of as many rounds
        from those that were measured (percentile bootstrap).
    """
    found: dict[str, Any] = {"value": {}, "range": {}}
    for name in times:
        columns = [times[name], times[against(name)], times[base] if base else np.zeros(len(times[name]))]
        ran = np.stack(columns)[:, ~np.isnan(times[name])]
        variant, reference = ran[0] - ran[2], ran[1] - ran[2]
        draws = np.random.default_rng(0).integers(len(variant), size=(2000, len(variant)))
        with np.errstate(divide="ignore", invalid="ignore"):  # The base against itself.
            value = np.median(variant) / np.median(reference)
            drawn = np.median(variant[draws], 1) / np.median(reference[draws], 1)
        found["value"][name] = round(float(value), 3)
        found["range"][name] = [round(float(edge), 3) for edge in np.quantile(drawn, [0.05, 0.95])]
    return found


def saved_bytes(run: Callable[[], torch.Tensor], known: list[torch.Tensor]) -> int:
    """Return how many bytes a forward saves for backward, beyond the tensors that are there anyway."""
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # Alive, so that no address is used twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def peak_bytes(run: Callable[[], Any], repeats: int = 5) -> int:
    """Return by how many bytes a run on the CPU raises what PyTorch has allocated, at its highest.

    The median of some runs: now and then the profiler loses an event.
    """
    return int(np.median([_peak_of_one_run(run) for _ in range(repeats)]))


def _peak_of_one_run(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def machine(threads: int, clock: str) -> dict[str, Any]:
    """Describe what the figures depend on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        fields = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
        names = ("model name", "cpu family", "model")
        model = ", ".join(f"{name} {fields[name]}" for name in names if name in fields)
    return {
        "cpu": model,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads,
        "clock": clock,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def write(name: str, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write docs/results/<name>.json, a row a line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    target.write_text(f'{{"machine": {json.dumps(described, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    print(f"wrote {target}")
