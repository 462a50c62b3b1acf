"""Does the runs that a plan names and that have no record yet, in the plan's order, and says what is left.

A plan is a function of the records so far, because what is run at last depends on what was best in development: it
returns (group, settings) pairs, with None for the settings of a run that cannot be named yet.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from rank_experts import __version__
from records import Record, Records, Settings, key

Planned = list[tuple[str, Settings | None]]
Plan = Callable[[Sequence[Record]], Planned]
RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser of what every experiment understands."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS / f"{name}.jsonl", help="default: %(default)s")
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="print what is done and what is left, and stop")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    return parser


def once(planned: Planned) -> Planned:
    """Leave out what an earlier group has planned already."""
    seen: set[str] = set()
    kept: Planned = []
    for group, settings in planned:
        name = None if settings is None else key(settings)
        if name not in seen:
            kept.append((group, settings))
        if name is not None:
            seen.add(name)
    return kept


def status(plan: Plan, records: Sequence[Record]) -> str:
    """Return a line a group: runs done, runs left, the processor time that is left where a run's cost is known."""
    done = {key(record["settings"]): record["cost"]["seconds"] for record in records}
    groups: dict[str, list[float | None]] = {}
    for group, settings in plan(records):
        groups.setdefault(group, []).append(None if settings is None else done.get(key(settings)))
    lines = []
    for group, costs in groups.items():
        known = [cost for cost in costs if cost is not None]
        left = len(costs) - len(known)
        time_left = f", about {left * statistics.fmean(known) / 60:.0f} min" if known and left else ""
        lines.append(f"{group:24} {len(known):4} done {left:4} left{time_left}")
    return "\n".join(lines)


def work(
    plan: Plan,
    run: Callable[[Settings], Record],
    records: Records,
    groups: Sequence[str] | None = None,
    limit: int | None = None,
) -> int:
    """Do what is left; several processes may do so at once.

    Args:
        plan: What is to be done, given the records.
        run: Does a run; returns its "result" and whatever of its "cost" this does not know.
        records: Where they are kept.
        groups: Only these of the plan's.
        limit: Stop after so many runs.

    Returns:
        How many runs this call did.
    """
    count = 0
    while limit is None or count < limit:
        for group, settings in _left(plan, records, groups):
            with records.claim(settings) as mine:
                if mine:
                    record = timed(run, settings)
                    records.append(record)
                    print(f"{group}: {_line(settings)} → {_line(record['result'])}", flush=True)
                    count += 1
                    break
        else:
            return count
    return count


def timed(run: Callable[[Settings], Record], settings: Settings) -> Record:
    """Do a run and note what it cost and on what it ran."""
    start = time.process_time()
    found = run(settings)
    versions = {"rank_experts": __version__, "torch": torch.__version__, "peft": peft.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    cost = {"seconds": round(time.process_time() - start, 1), "versions": versions, **found.get("cost", {})}
    return {"settings": settings, "result": found["result"], "cost": cost}


def _left(plan: Plan, records: Records, groups: Sequence[str] | None) -> list[tuple[str, Settings]]:
    found = records.read()
    done = {key(record["settings"]) for record in found}
    wanted = [(group, each) for group, each in plan(found) if groups is None or group in groups]
    return [(group, each) for group, each in wanted if each is not None and key(each) not in done]


def _line(values: dict[str, Any]) -> str:
    plain = {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
    texts = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in plain.items()}
    return " ".join(f"{name}={text}" for name, text in texts.items())
