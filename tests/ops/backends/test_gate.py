"""The token gate in PyTorch: the choice, bit for bit, and what the products before it are multiplied in."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rank_experts.ops.backends.gate import select
from rank_experts.ops.backends.pytorch import multiply
from rank_experts.routing import select_experts

SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45]


@pytest.mark.parametrize("num_experts", [2, 9, 64, 256, 300])
@pytest.mark.parametrize("num_tokens", [1, 200])
def test_select_is_bit_for_bit_the_routers(num_experts, num_tokens):
    keys = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (num_tokens, num_experts))]
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    keys = torch.where(keys.isnan() & (torch.rand(keys.shape) < 0.5), negative_nan, keys)
    for top_k in {1, num_experts // 2, num_experts}:
        assert torch.equal(select(keys, top_k), select_experts(keys, top_k))
        wide = torch.randn(num_tokens, num_experts * 2)[:, ::2]
        assert torch.equal(select(wide, top_k), select_experts(wide, top_k))


class Seen(TorchDispatchMode):
    """The operators that run, with the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((str(func), tuple(found.shape) if isinstance(found, torch.Tensor) else None))
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_accelerator_multiplies_in_16_bits_and_adds_in_32(dtype):
    with FakeTensorMode(), Seen() as seen:
        x, A, weight = (torch.empty(rows, 64, dtype=dtype, device="cuda") for rows in (100, 8, 12))
        projection, logits = multiply(x, [(A, dtype), (weight, torch.float32)])
    assert (projection.dtype, projection.shape) == (dtype, (100, 8))
    assert (logits.dtype, logits.shape) == (torch.float32, (100, 12))
    assert [shape for name, shape in seen.calls if "mm" in name] == [(100, 20)]
    assert not [name for name, shape in seen.calls if shape == (100, 64) and "empty" not in name]


def test_a_float32_router_on_an_accelerator_is_not_rounded():
    with FakeTensorMode(), Seen() as seen:
        x, A = (torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda") for rows in (100, 8))
        weight = torch.empty(12, 64, device="cuda")
        multiply(x, [(A, torch.bfloat16), (weight, torch.float32)])
    assert [(name, shape) for name, shape in seen.calls if "mm" in name] == [
        ("aten.mm.default", (100, 8)),
        ("aten.mm.default", (100, 12)),
    ]


@pytest.mark.gpu
def test_the_wide_product_is_exact_but_for_the_order_of_its_sum():
    x, A, weight = (torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda") for rows in (100, 8, 64))
    _, logits = multiply(x, [(A, torch.bfloat16), (weight, torch.float32)])
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
