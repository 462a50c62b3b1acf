"""Values that an accelerator is still computing, to be looked at without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Later:
    """A tensor on its way to the CPU.

    Args:
        tensor: On any device. From a CUDA device the copy starts at once, and nobody waits for it; from another
            accelerator it is made when it is asked for.

    Example:
        >>> later = Later(torch.tensor([True]))
        >>> later.is_here(), later.get()
        (True, tensor([True]))
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def is_here(self) -> bool:
        """Say whether `get` would not wait."""
        return self._tensor.device.type == "cpu" if self._event is None else self._event.query()

    def get(self) -> Tensor:
        """Return the tensor on the CPU; waits where it must."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()
