"""What a gate decided."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        gates: (N, r) weight of every rank; 0 where a rank is not used. One row a token from a token router, one row
            a task id from a task router.
        indices: (N, k) chosen experts, best first, from a token router; (N,) chosen rank r_t, 1…r, from a task router.
        probabilities: (N, E) or (N, r): the router's distribution, for auxiliary losses and reports.
    """

    gates: Tensor
    indices: Tensor
    probabilities: Tensor
