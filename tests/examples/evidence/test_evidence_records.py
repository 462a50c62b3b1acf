"""Runs are done once, whatever stops them, and by one process each."""

from __future__ import annotations

import doctest
import multiprocessing

import pytest


@pytest.fixture
def records(evidence, tmp_path):
    return evidence("records").Records(tmp_path / "deep" / "runs.jsonl")


def record(seed, seconds=60.0):
    return {"settings": {"seed": seed}, "result": {"error": seed / 10}, "cost": {"seconds": seconds}}


def three(records):
    return [("all", {"seed": seed}) for seed in range(3)]


def test_a_rerun_does_what_is_left(evidence, records):
    runner = evidence("runner")
    seen = []

    def run(settings):
        seen.append(settings["seed"])
        return {"result": {"error": 0.0}}

    assert runner.work(three, run, records, limit=1) == 1
    assert runner.work(three, run, records) == 2
    assert runner.work(three, run, records) == 0
    assert seen == [0, 1, 2]
    assert [found["settings"]["seed"] for found in records.read()] == [0, 1, 2]


def test_a_plan_may_follow_from_records(evidence, records):
    runner = evidence("runner")

    def plan(found):
        best = min((each["result"]["error"] for each in found), default=None)
        return [("search", {"rate": 1}), ("reported", None if best is None else {"rate": 1, "best": best})]

    assert "search                      0 done    1 left" in runner.status(plan, [])
    assert runner.work(plan, lambda settings: {"result": {"error": 0.25}}, records) == 2
    assert records.read()[1]["settings"] == {"rate": 1, "best": 0.25}


def test_only_the_groups_that_are_asked_for(evidence, records):
    def plan(found):
        return [("one", {"seed": 1}), ("two", {"seed": 2})]

    evidence("runner").work(plan, lambda settings: {"result": {}}, records, groups=["two"])
    assert [found["settings"] for found in records.read()] == [{"seed": 2}]


def test_the_order_of_settings_does_not_matter(evidence):
    key = evidence("records").key
    assert key({"a": 1, "b": [2]}) == key({"b": [2], "a": 1}) != key({"a": 1, "b": [3]})


def test_a_line_that_was_cut_off_is_done_anew(records):
    records.append(record(0))
    with records.path.open("a") as file:
        file.write('{"settings": {"se')
    assert [found["settings"]["seed"] for found in records.read()] == [0]
    records.append(record(1))
    assert [found["settings"]["seed"] for found in records.read()] == [0, 1]


def test_a_damaged_line_is_named(records):
    records.append(record(0))
    with records.path.open("a") as file:
        file.write("oops\n")
    records.append(record(1))
    with pytest.raises(ValueError, match=r"line 2.*Remove the line"):
        records.read()


def _hold(records, held, release):
    with records.claim({"seed": 0}) as mine:
        held.put(mine)
        release.wait()


def test_one_process_a_run(records):
    context = multiprocessing.get_context("fork")
    held, release = context.Queue(), context.Event()
    other = context.Process(target=_hold, args=(records, held, release))
    other.start()
    try:
        assert held.get(timeout=60)
        with records.claim({"seed": 0}) as mine:
            assert not mine
        with records.claim({"seed": 1}) as mine:
            assert mine
        # Its owner is gone, and it left no record: the run is free.
        other.kill()
        other.join()
        with records.claim({"seed": 0}) as mine:
            assert mine
        records.append(record(0))
        with records.claim({"seed": 0}) as mine:
            assert not mine
    finally:
        other.kill()


def test_status_counts_and_estimates(evidence):
    assert evidence("runner").status(three, [record(1, seconds=90)]) == (
        "all                         1 done    2 left, about 3 min"
    )


def test_intervals_are_students(evidence):
    intervals = evidence("intervals")
    found = intervals.mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.half == pytest.approx(2.776445 * 1.5811388 / 5**0.5, rel=1e-5)  # t(0.975, 4), from a table
    assert intervals.mean([1.0]).half is None


def test_pairs_take_out_what_seeds_share(evidence):
    ours = {seed: 10.0 * seed + 1 for seed in range(5)}
    theirs = {seed: 10.0 * seed + 2 for seed in range(6)}
    found = evidence("intervals").paired(ours, theirs)
    assert (found.value, found.half, found.count) == (-1, 0, 5)
    assert evidence("intervals").paired(ours, {9: 1.0}) is None


@pytest.mark.parametrize("module", ["records", "intervals", "teacher", "language_data", "languages_page"])
def test_the_examples_in_docstrings(evidence, module):
    found = doctest.testmod(evidence(module))
    assert found.attempted
    assert not found.failed
