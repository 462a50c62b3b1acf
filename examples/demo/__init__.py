"""The demo: LoRA, SMoRA and MoRE on four tasks mined from Python's standard library, on a CPU, in minutes."""

from .run import DemoResult, main, run_demo

__all__ = ["DemoResult", "main", "run_demo"]
