"""How the benchmarks measure: variants in turn, medians with spread, bytes, and what machine it was.

Run the benchmarks with the allocator settings of `make bench`: glibc maps tensors of 32 MiB and more anew each time,
which costs more than what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def in_turn(
    variants: dict[str, Callable[[], Any]], repeats: int, clock: str = "wall", warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Time variants A B C A B C …, so that whatever drifts on the machine drifts for all of them.

    Args:
        variants: Name to what is timed.
        repeats: How often each.
        clock: "wall", or "cpu": the calling thread's own time, for a machine that others use too (one thread only).
        warm_up: Runs of each before.

    Returns:
        Name to median and quartiles in milliseconds.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + repeats):
        for name, run in variants.items():
            start = now()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append((now() - start) * 1e3)
    return {name: _spread(values) for name, values in times.items()}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_ms": round(middle, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}


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


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return by how many bytes a run on the CPU raises what PyTorch has allocated, at its highest."""
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
    """Write docs/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    print(f"wrote {target}")
