"""Run the demo and keep its figures, which docs/results.md shows.

python examples/benchmarks/pages/demo_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "speed"))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from demo import run_demo
from measure import machine, write
from methods import METHODS


def main() -> None:
    """Write docs/results/demo.json."""
    torch.set_num_threads(1)
    described, found = machine(1, "wall"), run_demo()
    write("demo", described, [{"method": METHODS[name].label, **row._asdict()} for name, row in found.rows.items()])


if __name__ == "__main__":
    main()
