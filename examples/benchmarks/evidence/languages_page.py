"""Write docs/results/languages.md, .svg and .json from the records of `languages`.

python examples/benchmarks/evidence/languages_page.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
from catalogues import DJANGO, HOME_ASSISTANT, JUPYTERLAB_VERSION, LANGUAGES
from figures import table
from intervals import Mean, mean, paired
from language_data import CLASSES, MAX_TOKENS, SIZES, SPLITS
from languages_plan import (
    CURVES,
    DEVELOPMENT_SEED,
    EACH,
    FIXED,
    LONG,
    LONG_RATES,
    LONGEST,
    MAIN,
    MORE,
    RATES,
    ROOM,
    SEEDS,
    SHORT,
    UNNAMED,
    Search,
    Setting,
    plan,
    settings_of,
)
from methods import METHODS
from records import Record, Records, key
from runner import RESULTS, status

NOT_RUN = "not run"
REFERENCE = "lora_64"
DRAWN = ["lora_8", "lora_64", "lora_96", "blocks_32x2_top4", "smora_64_8", "more_8"]


class Found:
    """The records, asked by setting and method."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.search = Search(records)
        self.records = {key(record["settings"]): record for record in records}

    def runs(self, where: Setting, method: str) -> dict[int, Record]:
        """Return the record of each reported seed, at what was chosen in development."""
        chosen = self.search.best(where, method)
        if chosen is None:
            return {}
        keys = {seed: key(settings_of(where, method, *chosen, seed)) for seed in SEEDS}
        return {seed: self.records[name] for seed, name in keys.items() if name in self.records}

    def by_seed(self, where: Setting, method: str, what: str) -> dict[int, float]:
        """Return a result of each reported seed."""
        return {seed: record["result"][what] for seed, record in self.runs(where, method).items()}

    def curve(self, where: Setting, method: str) -> list[tuple[int, Mean]]:
        """Return (step, negative log-likelihood) along training."""
        runs = [record["result"]["curve"] for record in self.runs(where, method).values()]
        return [(same[0][0], mean([nll for _, nll, _ in same])) for same in zip(*runs)]

    def steps_to(self, where: Setting, method: str, likelihood: float) -> list[float | None]:
        """Return each seed's steps to a negative log-likelihood, None where it never gets there."""
        return [steps_to(record["result"]["curve"], likelihood) for record in self.runs(where, method).values()]


def steps_to(curve: Sequence[Sequence[float]], likelihood: float) -> float | None:
    """Return the step, between two points by a straight line, at which a curve first reaches a likelihood.

    Example:
        >>> steps_to([[10, 3.0, 0.1], [20, 1.0, 0.5]], 2.0)
        15.0
    """
    for before, after in zip([None, *curve[:-1]], curve):
        if after[1] <= likelihood:
            if before is None:
                return float(after[0])
            return before[0] + (after[0] - before[0]) * (before[1] - likelihood) / (before[1] - after[1])
    return None


def results(found: Found, where: Setting, methods: Sequence[str]) -> str:
    """Write a row a method: what counts, in the order that was fixed, and the paired differences."""
    reference = found.by_seed(where, REFERENCE, "nll")
    target = mean(list(reference.values())).value if reference else None
    head = ["method", "trained", "alpha, rate", "NLL", f"NLL − {METHODS[REFERENCE].label}'s", "accuracy, %"]
    head += [f"accuracy − {METHODS[REFERENCE].label}'s", f"steps to {METHODS[REFERENCE].label}'s NLL"]
    rows = []
    for method in methods:
        runs = found.runs(where, method)
        if not runs:
            rows.append([METHODS[method].label, *[NOT_RUN] * (len(head) - 1)])
            continue
        first = next(iter(runs.values()))
        cells = [f"{first['cost']['trained_parameters'] / 1e6:.2f} M"]
        cells += ["–" if method == "head" else f"{first['settings']['alpha']:g}, {first['settings']['rate']:g}"]
        for what, digits, factor in (("nll", 3, 1), ("accuracy", 1, 100)):
            own = found.by_seed(where, method, what)
            cells.append(mean(list(own.values())).text(digits, factor))
            difference = paired(own, found.by_seed(where, REFERENCE, what))
            same = method == REFERENCE or difference is None
            cells.append("–" if same else difference.text(digits, factor, sign=True))
        reached = [] if target is None else found.steps_to(where, method, target)
        there = [steps for steps in reached if steps is not None]
        text = f"{mean(there).value:.0f}" if there else "never"
        cells.append(text if len(there) in (0, len(reached)) else f"{text} ({len(there)} of {len(reached)} seeds)")
        rows.append([METHODS[method].label, *cells])
    return table(head, rows)


def gap(found: Found) -> str:
    """Write how SMoRA's lead over LoRA 64 changes with the length of training and with the heads."""
    settings = {"250 steps": SHORT, "1,000 steps": LONG, "2,000 steps": LONGEST, "250 steps, a head each": EACH}
    rows = []
    for name, where in settings.items():
        cells = []
        for what, digits, factor in (("nll", 3, 1), ("accuracy", 1, 100)):
            ours, theirs = (found.by_seed(where, method, what) for method in ("smora_64_8", REFERENCE))
            difference = paired(ours, theirs)
            cells.append(NOT_RUN if difference is None else difference.text(digits, factor, sign=True))
        rows.append([name, *cells])
    return table(["SMoRA 64/8 − LoRA r=64", "NLL", "accuracy, points"], rows)


def room(found: Found) -> str:
    """Write whether a language would rather have an adapter of its own, with one head and with a head each."""
    rows = []
    for name, where in {"one head": SHORT, "a head each": EACH}.items():
        difference = paired(*(found.by_seed(where, method, "nll") for method in ("lora_8_per_task", "lora_8")))
        rows.append([name, NOT_RUN if difference is None else difference.text(3, sign=True)])
    return table(["LoRA r=8 a task − LoRA r=8", "NLL"], rows)


def bearing(found: Found, method: str) -> str:
    """Write a method's negative log-likelihood in development, by scale and rate."""
    rows = []
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        keys = [key(settings_of(SHORT, method, scale, rate, DEVELOPMENT_SEED)) for rate in sorted(RATES)]
        if any(name in found.records for name in keys):
            cells = [f"{found.records[name]['result']['nll']:.3f}" if name in found.records else "–" for name in keys]
            rows.append([METHODS[method].label, f"{scale * METHODS[method].unit:g}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def bearings(found: Found) -> str:
    """Write how each method bears rates and scales."""
    head = table(["method", "alpha", *(f"{rate:g}" for rate in sorted(RATES))], [])
    rows = [bearing(found, method) for method in [*MAIN, *MORE] if method != "head"]
    return "\n".join([head, *(row for row in rows if row)])


def plot(found: Found, path: Path) -> None:
    """Draw learning curves: 250 steps, 1,000 steps where they were run, and 250 steps with a head each."""
    panels = [("250 steps, one head", SHORT), ("1,000 steps, one head", LONG), ("250 steps, a head each", EACH)]
    panels = [(title, where) for title, where in panels if found.runs(where, REFERENCE)] or panels[:1]
    figure, axes = figures.canvas(len(panels), width=3.2 + 3.2 * len(panels))
    for each, (title, where) in zip(axes, panels):
        for method in DRAWN:
            if curve := found.curve(where, method):
                steps = [step for step, _ in curve]
                style = figures.STYLES[method]
                each.plot(steps, [m.value for _, m in curve], label=METHODS[method].label, markersize=4, **style)
                low, high = ([m.value + sign * (m.half or 0) for _, m in curve] for sign in (-1, 1))
                each.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        each.set(title=title, xlabel="steps", ylim=(0, 3.5))
    axes[0].set_ylabel("negative log-likelihood, test split")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[-1].legend(handles, labels, fontsize="small", framealpha=0, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.save(figure, path)


def rates(values: Sequence[float]) -> str:
    """Write rates in order."""
    return ", ".join(f"{rate:g}" for rate in sorted(values))


def page(records: Sequence[Record]) -> str:
    """Return the page as Markdown."""
    found = Found(records)
    sizes = ", ".join(f"{size:,} for {name}" for name, size in SIZES.items())
    shares = ", ".join(f"{share:.0%} {name}" for name, share in SPLITS.items())
    return f"""# Eight languages behind one head

Written by `examples/benchmarks/evidence/languages_page.py` from `languages.jsonl`; `languages.py` there makes the
records.

The input is a language's name and an English software message, "German: Could not open the file"; the answer is the
first word of its translation, as a number among the {CLASSES} words that most often come first in that language. A
class thus means another word in each language, and the same English text has another answer in each:
{len(LANGUAGES)} tasks ({", ".join(LANGUAGES)}) that conflict behind one output.

The texts are JupyterLab's ({JUPYTERLAB_VERSION}), Django's ({DJANGO[1]}) and Home Assistant's ({HOME_ASSISTANT[1]}),
up to {MAX_TOKENS} tokens; a language has {sizes}, split by the English text
({shares}).

all-MiniLM-L6-v2, every linear layer of its upper three layers adapted, the rest frozen but a linear head on the mean of
the tokens. AdamW, batches of {FIXED["batch"]}, warm-up over 6 % of the steps, linear decay; the head's own rate is
{FIXED["head_rate"]:g} for all; {FIXED["dtype"]} by autocast. Rate and alpha were chosen by the negative log-likelihood
(NLL) on the development split, with a seed that is not reported, among the rates {rates(RATES)} and two alphas; at
1,000 steps among {rates(LONG_RATES)} with the alpha of 250 steps; at 2,000 steps as at 1,000. Fixed
beforehand: NLL on the test split counts first, accuracy second, the steps to the NLL that LoRA r=64 ends
with third. Mean over seeds ± half of the 95 % interval (t), the number of seeds in brackets; differences are paired by
seed. The head is not counted as trained.

![Learning curves](languages.svg)

{gap(found)}

## 250 steps, one head

{results(found, SHORT, [*MAIN, *MORE])}

## 1,000 steps, one head

{results(found, LONG, CURVES)}

## 2,000 steps, one head

{results(found, LONGEST, CURVES)}

## Control: a head for each language

No conflict at the output; rates chosen anew in development, alpha as above.

{results(found, EACH, [*MAIN[:3], *ROOM])}

An adapter for each language is what routing can hope for, and it sees an eighth of the texts: where it is ahead of one
adapter for all, tasks are in each other's way, and where it is behind, they help one another.

{room(found)}

## Control: the language's name left out

Only MoRE is told the language here; no other method can know it, so its row says nothing about MoRE's merit. Rates and
alphas as with the name.

{results(found, UNNAMED, MAIN[:3])}

## How each bears rates and scales

NLL on the development split after 250 steps, by rate; one seed. A guess at random gives
{math.log(CLASSES):.3f} (ln {CLASSES}).

{bearings(found)}

## What has been run

```text
{status(plan, records)}
```

`python examples/benchmarks/evidence/languages.py` goes on with what is left.
"""


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Return the means of the main settings as data: setting to method to [mean, half of its interval, seeds]."""
    found = Found(records)
    settings = {"250 steps": SHORT, "1,000 steps": LONG, "2,000 steps": LONGEST, "a head each": EACH}
    said: dict[str, Any] = {}
    for name, where in settings.items():
        for method in [*MAIN, *MORE]:
            for what in ("nll", "accuracy"):
                if own := found.by_seed(where, method, what):
                    each = mean(list(own.values()))
                    said.setdefault(name, {}).setdefault(method, {})[what] = [each.value, each.half, each.count]
    return said


def main(argv: list[str] | None = None) -> None:
    """Write the page, its plot and its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS / "languages.jsonl")
    parser.add_argument("--page", type=Path, default=RESULTS / "languages.md")
    args = parser.parse_args(argv)
    records = Records(args.records).read()
    args.page.write_text(page(records), encoding="utf-8")
    args.page.with_suffix(".json").write_text(json.dumps(summary(records), indent=1) + "\n", encoding="utf-8")
    plot(Found(records), args.page.with_suffix(".svg"))


if __name__ == "__main__":
    main()
