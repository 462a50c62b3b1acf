"""What `languages` runs, in which order, and what it settles on.

Rate and alpha are chosen by the negative log-likelihood on the development split alone, by a seed that is not reported.
What counts was fixed before the first run: the negative log-likelihood on the test split first, accuracy second, the
steps to a given likelihood third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from methods import METHODS
from records import Record, Settings, key
from runner import Planned, once

DATA = "e5d2484fc208"
"""The digest of the examples, so that records are of the same ones; see `language_data.Data.digest`."""

RATES = (2e-3, 1e-3, 3e-3, 5e-3)
LONG_RATES = (2e-3, 1e-3, 3e-3)
SEEDS = (0, 1, 2, 3, 4)
DEVELOPMENT_SEED = 1000
FIXED = {"data": DATA, "batch": 32, "head_rate": 1e-2, "dtype": "bfloat16"}

PAIR = ["lora_64", "smora_64_8"]
MAIN = [*PAIR, "more_8", "blocks_32x2_top4"]
MORE = ["lora_8", "lora_96", "lora_128", "more_8_paper", "blocks_16x4_top2", "blocks_8x8_top2", "blocks_8x8_top1"]
MORE += ["lora_8_per_task", "head"]
ROOM = ["lora_8", "lora_8_per_task"]
"""Whether tasks would rather be alone: one adapter for all against one for each."""
CURVES = ["lora_64", "smora_64_8", "more_8", "lora_96"]

Setting = dict[str, Any]
SHORT: Setting = {"steps": 250, "heads": "one", "named": True}
EACH = SHORT | {"heads": "each"}
UNNAMED = SHORT | {"named": False}
LONG = SHORT | {"steps": 1000}
LONGEST = SHORT | {"steps": 2000}


def settings_of(where: Setting, method: str, scale: float, rate: float, seed: int) -> Settings:
    """Return a run's settings, all of them."""
    own = METHODS[method]
    split = "development" if seed == DEVELOPMENT_SEED else "test"
    config = own.values | {"kind": own.kind, "per_task": own.per_task}
    run = {"method": method, "alpha": scale * own.unit, "rate": rate, "seed": seed, "split": split, "config": config}
    return FIXED | where | run


class Search:
    """What has been tried in development.

    Args:
        records: All of them.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.nll = {key(record["settings"]): record["result"]["nll"] for record in records}

    def candidates(self, where: Setting, method: str) -> list[tuple[float, float]] | None:
        """Return the (scale, rate) to try, or None where they follow from a search that is not over.

        At 250 steps all rates with all scales; elsewhere the rates that fit, with the scale that was best there.
        """
        if where == SHORT:
            rates = RATES if METHODS[method].kind != "none" else RATES[:1]
            return [(scale, rate) for scale in METHODS[method].scales for rate in rates]
        found = self.best(SHORT, method)
        if found is None:
            return None
        if where in (UNNAMED, LONGEST):
            # The same settings without the name; those of 1,000 steps for 2,000.
            found = found if where == UNNAMED else self.best(LONG, method)
            return None if found is None else [found]
        return [(found[0], rate) for rate in (RATES if where == EACH else LONG_RATES)]

    def best(self, where: Setting, method: str) -> tuple[float, float] | None:
        """Return the (scale, rate) of the least negative log-likelihood, or None until all have been tried."""
        candidates = self.candidates(where, method)
        if candidates is None or len(candidates) == 1:
            return candidates and candidates[0]
        found = {}
        for scale, rate in candidates:
            nll = self.nll.get(key(settings_of(where, method, scale, rate, DEVELOPMENT_SEED)))
            if nll is None:
                return None
            found[scale, rate] = math.inf if math.isnan(nll) else nll
        return min(found, key=lambda pair: found[pair])

    def runs(self, where: Setting, methods: Sequence[str]) -> list[Settings]:
        """Return the development runs that a setting needs, as far as they can be named."""
        tried = {name: self.candidates(where, name) or [] for name in methods}
        most = max(map(len, tried.values()), default=0)
        # Method by method within a rate, so that what is there compares early.
        return [
            settings_of(where, name, *tried[name][i], DEVELOPMENT_SEED)
            for i in range(most)
            for name in methods
            if 1 < len(tried[name]) > i
        ]

    def reported(self, where: Setting, methods: Sequence[str]) -> list[Settings | None]:
        """Return the runs on the test split, all methods before the next seed; None until settings are chosen."""
        chosen = {name: self.best(where, name) for name in methods}
        return [found and settings_of(where, name, *found, seed) for seed in SEEDS for name, found in chosen.items()]


def plan(records: Sequence[Record]) -> Planned:
    """Return (group, settings) of every run, the most telling first."""
    search = Search(records)
    bearing = [
        settings_of(SHORT, name, scale, rate, DEVELOPMENT_SEED)
        for scale in (2.0, 4.0)
        for rate in RATES
        for name in PAIR
    ]
    groups: list[tuple[str, Sequence[Settings | None]]] = [
        ("search, two methods", search.runs(SHORT, PAIR)),
        ("250 steps, two methods", search.reported(SHORT, PAIR)),
        ("search, 250 steps", search.runs(SHORT, MAIN[2:])),
        ("250 steps", search.reported(SHORT, MAIN[2:])),
        ("search, a head each", search.runs(EACH, MAIN[:3])),
        ("a head each", search.reported(EACH, MAIN[:3])),
        ("search, more methods", search.runs(SHORT, MORE)),
        ("250 steps, more methods", search.reported(SHORT, MORE)),
        ("search, room, a head each", search.runs(EACH, ROOM)),
        ("room, a head each", search.reported(EACH, ROOM)),
        ("search, 1,000 steps", search.runs(LONG, CURVES)),
        ("1,000 steps", search.reported(LONG, CURVES)),
        ("rates and scales", bearing),
        ("without the name", search.reported(UNNAMED, MAIN[:3])),
        ("2,000 steps", search.reported(LONGEST, CURVES)),
    ]
    return once([(group, each) for group, runs in groups for each in runs])
