"""The token gate of rows of several adapters: against `routing.token_routing`, compiled, and as Triton kernels."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from rank_experts.integrations.vllm import slots as slots_module
from rank_experts.integrations.vllm.slots import SlotGates
from rank_experts.routing import TokenGate, token_routing

D, R = 24, 20
# E, expert_rank, top_k, score_function, biased_gates
GATES = {
    "token": (20, 1, 4, "sigmoid", False),
    "fewer": (7, 1, 7, "sigmoid", False),
    "one": (1, 1, 1, "sigmoid", False),
    "softmax": (12, 1, 3, "softmax", False),
    "biased": (20, 1, 5, "sigmoid", True),
    "biased softmax": (9, 2, 2, "softmax", True),
    "blocks": (5, 4, 2, "sigmoid", False),
}


def gate(name):
    num_experts, *settings = GATES[name]
    weight = torch.randn(num_experts, D)
    if name == "token":
        weight[7] = weight[3]  # ties
    bias = torch.randint(0, 4, (num_experts,)) / 8 + 0.125
    expert_rank, top_k, score_function, biased_gates = settings
    return TokenGate(weight, bias, top_k, expert_rank, score_function, biased_gates)


def expected(x, own):
    """One row's gates by the library's own formula."""
    gates = torch.zeros(len(x), R)
    if own is None:
        return gates + 1
    found = own.route(x).gates
    gates[:, : found.shape[1]] = found
    return gates


def filled(slices=2, device="cpu"):
    """All gates and an adapter without, one a slot; the slices of a slot differ."""
    names = [*GATES, None]
    module = SlotGates(len(names), slices, D, R, device)
    gates = []
    for number in range(len(names)):
        own = [gate(name) if name else None for name in (names[(number + i) % len(names)] for i in range(slices))]
        module.set(number, own)
        gates.append(own)
    return module, gates


BATCHES = {
    "mixed": torch.tensor([0, -1, 3, 3, 7, 1, 2, -1, 4, 5, 6, 0, 7, 5]),
    "one slot": torch.full((9,), 4),
    "no adapter": torch.full((5,), -1),
    "without a gate": torch.full((5,), 7),
    "one row": torch.tensor([2]),
    "many": torch.arange(-1, 8).repeat(30),
    "nothing": torch.zeros(0, dtype=torch.int64),
}


def check(module, gates, x, slots, found, **tolerance):
    assert found.shape == (module.settings.shape[1], len(x), R)
    for (i, row), slot in itertools.product(enumerate(found), range(-1, len(gates))):
        mine = slots == slot
        own = torch.zeros(int(mine.sum()), R) if slot < 0 else expected(x[mine], gates[slot][i])
        torch.testing.assert_close(row[mine], own, rtol=1e-5, atol=1e-6, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_row_gets_its_own_adapters_gates(batch, dtype):
    module, gates = filled()
    slots = BATCHES[batch]
    x = torch.randn(len(slots), D).to(dtype)
    check(module, gates, x, slots, module(x, slots))


def test_a_slot_forgets_what_it_held():
    module, _ = filled()
    x, slots = torch.randn(6, D), torch.zeros(6, dtype=torch.int64)
    for own in ([gate("blocks"), None], [None, gate("one")], [None, None], [gate("softmax"), gate("token")]):
        module.set(0, own)
        check(module, [own], x, slots, module(x, slots))


def test_logits_of_parts_of_the_input_are_added_up_before_the_choice():
    module, gates = filled(slices=1)
    slots = BATCHES["mixed"]
    x = torch.randn(len(slots), D)
    halves = []
    for part in (slice(0, 10), slice(10, D)):
        half = SlotGates(len(gates), 1, len(range(*part.indices(D))), R)
        for number, (own,) in enumerate(gates):
            half.set(number, [own and own._replace(weight=own.weight[:, part])])
        halves.append((half, x[:, part]))
    logits = [slots_module.slot_logits(own, half.weight, half.settings, slots) for half, own in halves]
    found = halves[0][0](halves[0][1], slots, reduce=lambda mine: mine + logits[1])
    check(module, gates, x, slots, found)


def test_a_graph_holds_it_whole_whatever_the_batch_is():
    module, gates = filled()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in ("mixed", "no adapter", "many"):
            slots = BATCHES[batch]
            x = torch.randn(len(slots), D)
            check(module, gates, x, slots, compiled(x, slots))


def test_the_operators_are_sound():
    module, _ = filled()
    slots = BATCHES["mixed"]
    x = torch.randn(len(slots), D)
    operators = torch.ops.rank_experts_vllm
    given = (x, module.weight, module.settings, slots)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.slot_logits.default, given, test_utils=tests)
    logits = operators.slot_logits(*given)
    torch.library.opcheck(operators.slot_gates.default, (logits, module.bias, *given[2:]), test_utils=tests)


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from rank_experts.integrations.vllm import kernels

    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_kernels_compute_the_same(batch, dtype, kernels):
    module, gates = filled()
    slots = BATCHES[batch]
    x = torch.randn(len(slots), D).to(dtype)
    logits = kernels.slot_logits(x, module.weight, module.settings, slots)
    found = kernels.slot_gates(logits, module.bias, module.settings, slots)
    check(module, gates, x, slots, found.transpose(0, 1))


def test_the_kernels_take_views_and_rows_that_hold_anything(kernels):
    module, gates = filled()
    slots = BATCHES["many"]
    x = torch.randn(D, len(slots)).t()
    logits = kernels.slot_logits(x, module.weight, module.settings, slots)
    found = kernels.slot_gates(logits, module.bias, module.settings, slots)
    check(module, gates, x, slots, found.transpose(0, 1))
    # Rows that fill up a CUDA graph have whatever was in the memory.
    filling = torch.cat([slots, torch.tensor([2**60, 8, -(2**60)])])
    x = torch.cat([x, torch.randn(3, D)])
    logits = kernels.slot_logits(x, module.weight, module.settings, filling)
    again = kernels.slot_gates(logits, module.bias, module.settings, filling)
    assert torch.equal(again[:-3], found)


def test_ties_and_nans_as_the_library_has_them(kernels):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 30.0, -30.0, torch.nan])
    for softmax in (False, True):
        kind = "softmax" if softmax else "sigmoid"
        own = TokenGate(torch.zeros(R, D), torch.zeros(R), 6, score_function=kind)
        module = SlotGates(1, 1, D, R)
        module.set(0, [own])
        logits = values[torch.randint(0, 7, (100, R))]
        slots = torch.zeros(100, dtype=torch.int64)
        theirs = token_routing(logits, own.balance_bias, top_k=6, score_function=kind).gates
        for ours in (kernels.slot_gates, slots_module.slot_gates):
            found = ours(logits[:, None].clone(), module.bias, module.settings, slots)[:, 0]
            torch.testing.assert_close(found, theirs, equal_nan=True)
        assert theirs.isnan().any()


COMPILE = """
import triton, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rank_experts.integrations.vllm import kernels
i, f = "*i64", "*fp32"
both = {"SLICES": 3, "BLOCK_N": 64}
logits = dict(x_ptr="*%s", weight_ptr=f, settings_ptr=i, slots_ptr=i, z_ptr=f, num_rows="i32", d_in="i32",
              most_experts="i32", x_stride="i32")
gates = dict(z_ptr=f, bias_ptr=f, settings_ptr=i, slots_ptr=i, gates_ptr=f, num_rows="i32", num_slots="i32",
             most_ranks="i32")
for capability in (80, 90):
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {k: v.replace("%s", dtype) for k, v in logits.items()}
        constants = both | {"BLOCK_E": 64, "BLOCK_D": 64}
        pair = (kernels._logits_kernel, signature, constants), (kernels._gates_kernel, gates, both | {"BLOCK_R": 64})
        for fn, sig, const in pair:
            sig = sig | dict.fromkeys(const, "constexpr")
            made = triton.compile(ASTSource(fn, sig, constexprs=const), target=GPUTarget("cuda", capability, 32))
            assert f"sm_{capability}" in made.asm["ptx"] and made.asm["cubin"], capability
print("compiled")
"""


def test_the_kernels_compile_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("compiled\n"), done.stderr
