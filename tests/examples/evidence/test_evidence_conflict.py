"""One layer: the tasks are what they claim to be, and adapters reach what can be computed of them."""

from __future__ import annotations

import pytest
import torch


def teacher(evidence, kind="subspaces", **changed):
    values = {"tasks": 4, "rank": 2, "overlap": 0.5, "visible": 0.3, "noise": 0.1, "width": 32, "seed": 0}
    return evidence("teacher").Teacher(kind, **values | changed)


@pytest.mark.parametrize("kind", ["subspaces", "nested"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_error_of_a_matrix_is_what_inputs_say(evidence, kind, rank):
    tasks = teacher(evidence, kind)
    matrix = tasks.best_matrix(rank)
    x, y, _ = tasks.batch(100_000, torch.Generator().manual_seed(1))
    measured = (y - x @ matrix.float().T).square().sum() / y.square().sum()
    assert float(tasks.error_left(matrix)) == pytest.approx(float(measured), abs=0.005)


@pytest.mark.parametrize("rank", [None, 3])
def test_no_other_matrix_is_better(evidence, rank):
    tasks = teacher(evidence)
    best = tasks.best_matrix(rank)
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(best)
    for _ in range(20):
        # The same rank, other directions.
        near = best + 0.02 * torch.randn(best.shape, generator=generator, dtype=best.dtype)
        u, s, vh = torch.linalg.svd(near)
        near = u[:, : rank or 32] @ torch.diag(s[: rank or 32]) @ vh[: rank or 32]
        assert tasks.error_left(near) > tasks.error_left(best)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_overlap_is_the_share_in_conflict(evidence, overlap):
    tasks = teacher(evidence, overlap=overlap, noise=0.0, width=256)
    common = tasks.outputs_TRD[:, : round(overlap * 2)]
    # Of the outputs for one input a single matrix gives the mean: 1 - 1/T stays where they have nothing in common.
    left = overlap * (1 - float(common.mean(0).square().sum(-1).mean())) if overlap else 0.0
    assert float(tasks.error_left(tasks.best_matrix())) == pytest.approx(left, abs=1e-4)
    assert left == pytest.approx(overlap * (1 - 1 / 4), abs=0.05)
    assert float(tasks.error_left(torch.zeros(256, 256).double())) == pytest.approx(1)


def test_a_layer_that_is_too_narrow_is_refused(evidence):
    with pytest.raises(ValueError, match="4 tasks of rank 2 need 9 directions"):
        teacher(evidence, width=8)
    with pytest.raises(ValueError, match="kind='other'"):
        teacher(evidence, "other")


def run(evidence, method, rate, **changed):
    conflict = evidence("conflict")
    point = conflict.POINT | {"tasks": 4, "rank": 2, "width": 32, "batch": 128, "steps": 150} | changed
    return conflict.run(conflict.settings_of(point, method, rate, 0))


def test_one_task_is_learnt(evidence):
    assert run(evidence, "lora_8", 1e-2, tasks=1)["result"]["error"] < 0.01


def test_a_lora_ends_at_the_limit_and_a_router_below(evidence):
    tasks = teacher(evidence, overlap=1.0, visible=1.0, noise=0.05)
    limit = float(tasks.error_left(tasks.best_matrix(8)))
    assert run(evidence, "lora_8", 1e-2)["result"]["error"] == pytest.approx(limit, abs=0.03)
    assert run(evidence, "smora_64_8", 1e-2)["result"]["error"] < 0.1 < 0.7 < limit


def test_an_adapter_a_task_leaves_nothing(evidence):
    found = run(evidence, "lora_8_per_task", 1e-2)
    assert found["result"]["error"] < 0.05
    assert found["cost"]["trained_parameters"] == 4 * 8 * (32 + 32)


def test_rates_are_chosen_in_development(evidence):
    conflict = evidence("conflict")

    def record(rate, seed, error):
        settings = conflict.settings_of(conflict.POINT, "lora_8", rate, seed)
        return {"settings": settings, "result": {"error": error}, "cost": {"seconds": 1.0}}

    tried = [record(rate, conflict.DEVELOPMENT_SEED, abs(rate - 3e-3)) for rate in conflict.RATES]
    tried[-1]["result"]["error"] = float("nan")
    reported = [record(rate, 0, -1.0) for rate in conflict.RATES if rate != 3e-3]
    assert conflict.best_rate(conflict.errors_of(tried[:-1] + reported), conflict.POINT, "lora_8") is None
    assert conflict.best_rate(conflict.errors_of(tried + reported), conflict.POINT, "lora_8") == 3e-3
    planned = [each for _, each in conflict.plan(tried) if each and each["method"] == "lora_8"]
    assert {each["rate"] for each in planned if each["role"] == "reported"} == {3e-3}
    assert {each["seed"] for each in planned if each["role"] == "reported"} == set(conflict.SEEDS)


def test_the_page_says_what_records_say(evidence, tmp_path, monkeypatch):
    page, conflict, records = (evidence(name) for name in ("conflict_page", "conflict", "records"))
    monkeypatch.setattr(page, "theory", lambda point, rank: 0.5)
    log = records.Records(tmp_path / "conflict.jsonl")
    for method, error in (("lora_64", 0.8), ("smora_64_8", 0.2)):
        for seed in (conflict.DEVELOPMENT_SEED, 0, 1):
            for rate in conflict.RATES if seed == conflict.DEVELOPMENT_SEED else (1e-2,):
                settings = conflict.settings_of(conflict.POINT, method, rate, seed)
                result = {"error": error + abs(rate - 1e-2) + 0.01 * seed}
                log.append({"settings": settings, "result": result, "cost": {"seconds": 1.0}})
    page.main(["--records", str(log.path), "--page", str(tmp_path / "conflict.md")])
    text = (tmp_path / "conflict.md").read_text()
    assert "| SMoRA 64/8 | not run | not run | not run | not run | 0.205 ± 0.064 (2) |" in text
    assert "| SMoRA 64/8 | not run | not run | not run | not run | -0.600 ± 0.000 (2) |" in text
    assert "ahead at 1; not run at 0, 0.25, 0.5, 0.75" in text
    assert "| MoRE r=8 | not run | not run | not run | not run | not run |" in text
    assert "best single matrix" in (tmp_path / "conflict.svg").read_text()
