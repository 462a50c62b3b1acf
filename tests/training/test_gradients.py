"""What is computed of tasks' gradients, against the formula and on subspaces that are known."""

from __future__ import annotations

import math

import pytest
import torch

from rank_experts.training.gradients import LayerGradients, common_energy, cosines

T, R, D = 3, 4, 11


def gradients(rows_2TRD, extra=0):
    flat = rows_2TRD.flatten(2)
    other = torch.zeros(2, len(flat[0]), extra)
    return LayerGradients(torch.cat([flat, other], dim=2), tuple(rows_2TRD.shape[2:]))


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_energy_is_the_formulas(rank):
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(T, R, D, generator=generator).double()
    halves = torch.stack([signal + 0.3 * torch.randn(T, R, D, generator=generator).double() for _ in range(2)])
    inside = energy = 0.0
    for task in range(T):
        others = [halves[:, t].sum(0) for t in range(T) if t != task]
        stacked = torch.cat([other / other.norm() for other in others])
        V = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank].T
        P = V @ V.T
        inside += float((halves[0, task] @ P).flatten() @ (halves[1, task] @ P).flatten())
        energy += float(halves[0, task].flatten() @ halves[1, task].flatten())
    assert 0 < inside / energy < 1 or rank == 20
    assert common_energy(gradients(halves, extra=5), rank) == pytest.approx(inside / energy, abs=1e-6)


@pytest.mark.parametrize(("shared", "expected"), [(0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0)])
def test_it_is_the_share_of_directions_that_tasks_have_in_common(shared, expected):
    eye = torch.eye(T * R)
    # Each task wants four directions equally, of which some are everybody's; what it wants of them is its own.
    rows = torch.stack([torch.cat([eye[:shared], eye[t * R + shared : (t + 1) * R]]) for t in range(T)])
    rows[1, :shared] *= -1
    assert common_energy(gradients(torch.stack([rows, rows])), rank=R) == pytest.approx(expected, abs=1e-6)


def test_noise_is_in_neither():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(R, 400, generator=generator)
    signs = torch.tensor([1.0, 1.0, -1.0])
    halves = signs[:, None, None] * direction + 2 * torch.randn(2, T, R, 400, generator=generator)
    found = gradients(halves)
    expected = torch.outer(signs, signs)
    torch.testing.assert_close(cosines(found), expected, atol=0.2, rtol=0)
    # With the noise counted as the tasks', it would be a fifth.
    assert common_energy(found, rank=R) > 0.4


def test_nothing_but_noise_is_not_a_number():
    halves = torch.ones(2, 2, 1, 3)
    halves[1] *= -1
    found = gradients(halves)
    assert math.isnan(common_energy(found, rank=1))
    assert cosines(found).isnan().all()
    assert math.isnan(common_energy(gradients(torch.zeros(2, 2, 1, 3)), rank=1))
