"""Run the demo and keep its figures, which the README shows.

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


def main() -> None:
    """Write docs/results/demo.json."""
    described = machine(torch.get_num_threads(), "wall")
    found = run_demo()
    rows = [{"method": "majority class", "accuracy": found.majority}]
    rows += [{"method": name, **row._asdict()} for name, row in found.rows.items()]
    write("demo", described, rows)


if __name__ == "__main__":
    main()
