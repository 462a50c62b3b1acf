"""Pooling against float64, in every dtype, at lengths beyond what 16 bits can count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_experts.routing import pool_examples, pool_gathered

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
POOLINGS = ["mean", "first", "last"]
# Whole numbers end at 256 in bfloat16 and at 2,048 in float16.
LENGTHS = st.one_of(st.integers(1, 12), st.sampled_from([255, 256, 257, 300, 2047, 2048, 2049, 2500]))
MASKS = ["none", "left", "right", "scattered", "all padding"]


def oracle(x, mask, pooling):
    """Example by example, from its chosen tokens in float64."""
    rows = []
    for tokens, own in zip(x.double(), mask.bool(), strict=True):
        found = tokens[own]
        rows.append(
            tokens.new_zeros(tokens.shape[-1])
            if not len(found)
            else {"mean": found.mean(0), "first": found[0], "last": found[-1]}[pooling]
        )
    return torch.stack(rows)


def drawn(length, kind, dtype, level, seed):
    """(3, length, 2) values around `level` and a mask."""
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, length, 2, generator=random) + level).to(dtype)
    mask = torch.ones(3, length, dtype=torch.int64)
    if kind == "left":
        mask[1, : length // 2] = 0
    elif kind == "right":
        mask[1, -(length // 2 + 1) :] = 0
    elif kind == "scattered":
        mask = (torch.rand(3, length, generator=random) > 0.4).long()
    elif kind == "all padding":
        mask[2] = 0
    return x, mask


cases = given(
    length=LENGTHS,
    kind=st.sampled_from(MASKS),
    dtype=st.sampled_from(DTYPES),
    pooling=st.sampled_from(POOLINGS),
    level=st.sampled_from([0.0, 2.0, 1000.0]),
    seed=st.integers(0, 1000),
)


@cases
@settings(max_examples=150, deadline=None)
def test_pooling_equals_float64_whatever_the_dtype_and_length(length, kind, dtype, pooling, level, seed):
    x, mask = drawn(length, kind, dtype, level, seed)
    expected = oracle(x, mask, pooling)
    for given_mask in (mask, mask.bool(), mask.to(dtype)):
        pooled = pool_examples(x, None if kind == "none" else given_mask, pooling)
        assert pooled.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)


@cases
@settings(max_examples=150, deadline=None)
def test_pooling_gathered_tokens_equals_float64_whatever_the_dtype_and_length(
    length, kind, dtype, pooling, level, seed
):
    x, mask = drawn(length, kind, dtype, level, seed)
    positions = torch.randperm(3 * length, generator=torch.Generator().manual_seed(seed))
    pooled, present = pool_gathered(
        x.flatten(0, 1)[positions],
        positions // length,
        positions,
        3,
        None if kind == "none" else mask.flatten()[positions],
        pooling,
    )
    assert pooled.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(pooled.double(), oracle(x, mask, pooling), rtol=1e-5, atol=1e-5)
    assert present.tolist() == mask.bool().any(1).tolist()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_example_that_is_all_padding_pools_to_zero_even_where_its_values_are_none(pooling):
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    if pooling != "mean":
        x[1] = torch.nan
    assert pool_examples(x, torch.tensor([[1, 1], [0, 0]]), pooling)[1].tolist() == [0.0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_reach_the_values_in_their_own_dtype(pooling):
    x, mask = drawn(300, "right", torch.bfloat16, 1.0, 0)
    wide = x.double().requires_grad_()
    oracle(wide, mask, pooling).sum().backward()
    x.requires_grad_()
    pool_examples(x, mask, pooling).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-2, atol=1e-4)
