"""The demo: LoRA, SMoRA and MoRE on eight languages, behind one head and with a head each, on a CPU in minutes.

It is the small form of the experiment `languages` in examples/benchmarks/evidence, whose data, model and training it
uses.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

from .run import DemoResult, Row, main, run_demo

__all__ = ["DemoResult", "Row", "main", "run_demo"]
