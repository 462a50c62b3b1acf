"""The backends, and the one place that chooses among them.

A backend is a module with the functions of `Backend`. What is fast for one processor (decoding, few ranks) lies in its
folder and nowhere else; a new one is a folder and a line in `_candidates`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, Protocol

from torch import Tensor

from ..announcement import announce
from ..operands import Base, Gradients, Kept, Needed, Operands
from . import cpu, pytorch


class Backend(Protocol):
    """What computes the op, without autograd and without autocast. All choose the same experts for the same logits.

    Those that are asked before PyTorch have two more: `decode(base, op)`, which returns y and a token gate's choice for
    a few tokens without gradients, and `count(y, indices, num_experts, mask)`, which returns what `load_of_output`
    does. Either may return None where it does not serve.
    """

    NAME: str

    def serves(self, op: Operands) -> bool:
        """Say whether the backend takes these operands and is expected to be the fastest that does."""
        ...

    def forward(self, op: Operands, y: Tensor, fresh: bool) -> tuple[Tensor, Tensor | None, Kept]:
        """Add the update to the base layer's output y (…, d_out), which may be overwritten where it is `fresh`.

        Returns:
            (…, d_out) in y's dtype; a token gate's choice (N, k) int64, best first; what backward keeps.
        """
        ...

    def backward(self, op: Operands, kept: Kept, dy: Tensor, dx: Tensor | None, needed: Needed) -> Gradients:
        """Differentiate the update.

        Args:
            op: What forward had, but for what it does not need: x where A reads another tensor and the gate none, and
                a balancing bias that only selects.
            kept: From `forward`.
            dy: (…, d_out).
            dx: (N, d_in) the base layer's share of x's gradient, to be added to and overwritten; None: there is none.
            needed: Which gradients to return.
        """
        ...


def choose(op: Operands) -> Backend:
    """Return the fastest backend that serves the operands."""
    for backend in _candidates(op.x):
        if backend.serves(op):
            return backend
    return pytorch


def decode(base: Base, op: Operands) -> tuple[Tensor, Tensor] | None:
    """Return y and the chosen experts for a few tokens without gradients; None where no backend has a way for them."""
    for backend in _candidates(op.x):
        if backend.serves(op) and (found := backend.decode(base, op)) is not None:
            announce(backend.NAME)
            return found
    return None


def count(y: Tensor, indices: Tensor, num_experts: int, mask: Tensor | None) -> Tensor | None:
    """Return what `load_of_output` does; None where no backend has a way for it."""
    for backend in _candidates(y):
        return backend.count(y, indices, num_experts, mask)
    return None


def _candidates(x: Tensor) -> tuple[Any, ...]:
    # Beside PyTorch.
    if x.is_cpu:
        return (cpu,)
    return _triton() if x.device.type == "cuda" else ()


@functools.cache
def _triton() -> tuple[Any, ...]:
    # Nothing else of the library imports it.
    if importlib.util.find_spec("triton") is None:
        announce("no Triton kernels, because Triton is not installed")
        return ()
    return (importlib.import_module(".triton", __package__),)
