"""How the benchmarks judge: ratios of differences within rounds, their ranges, and the goals' verdicts."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples/benchmarks"


@pytest.fixture
def example(monkeypatch):
    for room in ("speed", "pages"):
        monkeypatch.syspath_prepend(str(BENCHMARKS / room))
    return importlib.import_module


def drifting(rounds=40, noise=0.0):
    """A machine whose speed changes threefold; an adapter costs 2, ours 1."""
    generator = np.random.default_rng(1)
    base = np.linspace(100, 300, rounds)
    times = {"base": base, "lora": base + 2, "ours": base + 1}
    return {name: [float(t) for t in each + noise * generator.standard_normal(rounds)] for name, each in times.items()}


def test_a_drift_leaves_the_overhead_alone(example):
    found = example("measure").overheads(drifting(), lambda kind: "lora")
    assert found["value"] == pytest.approx({"base": 0.0, "lora": 1.0, "ours": 0.5})
    assert found["range"]["ours"] == pytest.approx([0.5, 0.5])


def test_noise_widens_the_range(example):
    measure = example("measure")
    widths = []
    for noise in (0.05, 0.5):
        low, high = measure.overheads(drifting(noise=noise), lambda kind: "lora")["range"]["ours"]
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_the_total_counts_the_base(example):
    found = example("measure").overheads(drifting(), lambda kind: "lora", base=None)
    assert found["value"]["ours"] == pytest.approx(201 / 202, abs=1e-3)


def test_what_runs_seldom_is_compared_with_its_own_rounds(example):
    measure = example("measure")
    runs = []
    variants = {name: lambda name=name: runs.append(name) for name in ("base", "slow")}
    times = measure.in_turn(variants, repeats=9, warm_up=2, seldom=["slow"])
    assert runs.count("base") == 11
    assert [not math.isnan(each) for each in times["slow"]] == [i % 4 == 0 for i in range(9)]
    assert runs.count("slow") == 4  # once to warm up
    times = drifting()
    times["ours"] = [t if i % 4 == 0 else math.nan for i, t in enumerate(times["ours"])]
    found = measure.overheads(times, lambda kind: "lora")
    assert found["value"]["ours"] == pytest.approx(0.5)
    spread = measure.spread(times)["ours"]
    assert spread["low_ms"] < spread["median_ms"] < spread["high_ms"]


def test_rounds_go_on_for_the_seconds_that_are_asked(example, monkeypatch):
    measure = example("measure")
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    times = measure.in_turn({"base": lambda: None}, repeats=2, clock="cpu", warm_up=1, seconds=30)
    assert 10 < len(times["base"]) < 40


@pytest.mark.parametrize(
    ("ranges", "at_least", "said"),
    [
        ([(0.2, 0.3), (0.5, 0.9)], False, "met"),
        ([(0.2, 0.3), (0.9, 1.1)], False, "undecided"),
        ([(0.2, 9.0), (1.2, 1.4)], False, "missed by 0.3"),
        ([(1.1, 1.2)], True, "met"),
        ([(0.9, 1.2)], True, "undecided"),
        ([(0.7, 0.9)], True, "missed by 0.2"),
    ],
)
def test_a_goal_is_met_missed_or_undecided(example, ranges, at_least, said):
    goals = example("goals")
    found = [goals.Measured("here", (low + high) / 2, low, high) for low, high in ranges]
    goal = goals.Goal("what", 1.0, lambda results: iter(found), at_least)
    decides, verdict = goals.verdict(goal, found)
    assert (decides, verdict) == (found[-1], said)


def test_every_goal_is_judged_by_the_results(example):
    goals, page = example("goals"), example("page")
    lines = goals.verdicts(page.read())
    assert len(lines) == len(goals.GOALS)
    unmeasured = [what for what, _, measured, _ in lines if measured == "not measured"]
    assert all("GPU" in what for what in unmeasured)


def test_what_a_gpu_gave_is_judged_and_shown(example, tmp_path, monkeypatch):
    gpu, goals, page = example("gpu"), example("goals"), example("page")
    monkeypatch.setattr(example("measure"), "RESULTS", tmp_path)
    sizes = ["--tokens", "64", "--batch", "1", "--width", "64", "--repeats", "3", "--seconds", "0", "--replays", "1"]
    gpu.main(["--device", "cpu", "--eager", *sizes, "--name", "gpu"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["of"], row["tokens"], row["rounds"]) for row in found["rows"]] == [
        ("training", 64, 3),
        ("decoding", 1, 3),
    ]
    assert "| training | 64 | 64 | bfloat16 | True |" in page.gpu(found)

    def judged() -> dict[str, str]:
        return {what: measured for what, _, measured, _ in goals.verdicts({"gpu": found}) if "GPU" in what}

    assert set(judged().values()) == {"not measured"}  # Of eager runs, and of this size, nothing is asked.
    for row in found["rows"]:
        row |= {"eager": False} | ({"tokens": 8192, "width": 4096} if row["of"] != "decoding" else {})
    assert not [what for what, measured in judged().items() if measured == "not measured"]


def test_results_are_written_a_row_a_line(example, tmp_path, monkeypatch):
    measure = example("measure")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    rows = [{"tokens": 1, "range": [0.1, 0.2]}, {"tokens": 2, "range": [0.3, 0.4]}]
    measure.write("some", {"cpu": "one"}, rows)
    text = (tmp_path / "some.json").read_text()
    assert json.loads(text) == {"machine": {"cpu": "one"}, "rows": rows}
    assert [line for line in text.splitlines() if "tokens" in line] == [json.dumps(rows[0]) + ",", json.dumps(rows[1])]
