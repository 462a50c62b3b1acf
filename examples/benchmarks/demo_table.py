"""Run the demo and keep its figures, which the README shows.

python examples/benchmarks/demo_table.py
"""

from __future__ import annotations

import torch

from measure import machine, write
from rank_experts.demo import run_demo


def main() -> None:
    """Write docs/results/demo.json."""
    described = machine(torch.get_num_threads(), "wall")
    found = run_demo()
    rows = [{"method": "majority class", "accuracy": found.majority}]
    rows += [{"method": name, **row._asdict()} for name, row in found.rows.items()]
    write("demo", described, rows)


if __name__ == "__main__":
    main()
