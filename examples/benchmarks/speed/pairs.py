"""Two checkouts of this library beside each other: a benchmark in turn, A B A B …, each against LoRA in its own run.

    git worktree add ../before v0.1.0
    python examples/benchmarks/speed/pairs.py ../before

A process of each checkout measures its adapters and PEFT's LoRA in turn; what is compared is the adapters' time over
LoRA's, so that what drifts from one process to the next drifts out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from measure import RESULTS, machine, write

HERE = Path(__file__).resolve().parents[3]
# A benchmark's script, and arguments that are measured within a minute.
BENCHMARKS = {
    "layer": "--tokens 16 512 4096 --width 768 2048 --published-up-to 0 --repeats 8 --seconds 1",
    "training_step": "--repeats 5",
    "decode": "--repeats 7 --batch 1 8",
}
Rows = list[dict[str, Any]]
NAMES = ("tokens", "width", "dtype", "shape", "layers", "hidden", "batch", "length")


def run(checkout: Path, benchmark: str, arguments: str, threads: int) -> Rows:
    """Run a benchmark of a checkout with that checkout's library and return its rows."""
    script = next((checkout / "examples/benchmarks").rglob(f"{benchmark}.py"))
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, str(script), *arguments.split(), "--threads", str(threads), "--name", "pair"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    file = checkout / "docs/results/pair.json"
    rows = json.loads(file.read_text())["rows"]
    file.unlink()
    return rows


def compare(
    benchmark: str, before: list[list[dict[str, Any]]], after: list[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, for each size and variant, the later checkout's time over LoRA's by the earlier one's, round by round."""
    found = []
    for old, new in zip(zip(*before), zip(*after), strict=True):
        size = {name: old[0][name] for name in NAMES if name in old[0]}
        for variant in old[0]["total"]["value"]:
            if variant.startswith(("base", "lora", "published", "xlora")) or variant not in new[0]["total"]["value"]:
                continue
            ratios = [b["total"]["value"][variant] / a["total"]["value"][variant] for a, b in zip(old, new)]
            row = {"benchmark": benchmark, **size, "variant": variant, "ratio": round(statistics.median(ratios), 3)}
            found.append(row | {"range": [round(min(ratios), 3), round(max(ratios), 3)], "rounds": len(ratios)})
    return found


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the earlier checkout")
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="pairs")
    args = parser.parse_args()
    rows = []
    for benchmark in args.benchmarks:
        before, after = [], []
        for _ in range(args.rounds):
            before.append(run(args.before.resolve(), benchmark, BENCHMARKS[benchmark], args.threads))
            after.append(run(HERE, benchmark, BENCHMARKS[benchmark], args.threads))
        for row in compare(benchmark, before, after):
            print(*row.values(), flush=True)
            rows.append(row)
    write(args.name, machine(args.threads, "wall"), rows)
    print(f"{RESULTS / args.name}.json")


if __name__ == "__main__":
    main()
