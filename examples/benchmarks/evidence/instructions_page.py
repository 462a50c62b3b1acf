"""Write docs/results/instructions.md from the records of `instructions`.

python examples/benchmarks/evidence/instructions_page.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from figures import table
from instruction_data import GLUE, SIZES, TRANSLATIONS
from instructions import (
    COMPARED,
    DEVELOPMENT_SEED,
    FIXED,
    RATES,
    SEARCH_STEPS,
    SEEDS,
    best_rate,
    plan_for,
    settings_of,
)
from intervals import mean, paired
from methods import METHODS
from records import Record, Records, key
from runner import RESULTS, status

NOT_RUN = "not run"
REFERENCE = "lora_64"


def runs(records: Sequence[Record], method: str, device: str) -> dict[int, Record]:
    """Return the record of each reported seed."""
    rate = best_rate(records, method, device)
    if rate is None:
        return {}
    found = {key(record["settings"]): record for record in records}
    keys = {seed: key(settings_of(method, rate, seed, device)) for seed in SEEDS}
    return {seed: found[name] for seed, name in keys.items() if name in found}


def by_seed(found: dict[int, Record], what: str) -> dict[int, float]:
    """Return a result of each seed."""
    return {seed: record["result"][what] for seed, record in found.items()}


def results(records: Sequence[Record], device: str) -> str:
    """Write a row a method."""
    other = METHODS[REFERENCE].label
    head = ["method", "trained", "rate", "NLL", f"NLL − {other}'s", "exact, %", f"exact − {other}'s"]
    reference = runs(records, REFERENCE, device)
    rows = []
    for method in COMPARED:
        found = runs(records, method, device)
        if not found:
            rows.append([METHODS[method].label, *[NOT_RUN] * (len(head) - 1)])
            continue
        first = next(iter(found.values()))
        cells = [f"{first['cost']['trained_parameters'] / 1e6:.2f} M", f"{first['settings']['rate']:g}"]
        for what, digits, factor in (("nll", 3, 1), ("exact", 1, 100)):
            own = by_seed(found, what)
            cells.append(mean(list(own.values())).text(digits, factor))
            difference = None if method == REFERENCE else paired(own, by_seed(reference, what))
            cells.append("–" if difference is None else difference.text(digits, factor, sign=True))
        rows.append([METHODS[method].label, *cells])
    return table(head, rows)


def by_task(records: Sequence[Record], device: str) -> str:
    """Write each task's exact answers, a column a method."""
    found = {method: runs(records, method, device) for method in COMPARED}
    done = {method: each for method, each in found.items() if each}
    if not done:
        return f"Exact answers by task: {NOT_RUN}."
    tasks = list(next(iter(next(iter(done.values())).values()))["result"]["by_task"])
    rows = [
        [
            task,
            *(
                mean([100 * record["result"]["by_task"][task][1] for record in each.values()]).text(1)
                for each in done.values()
            ),
        ]
        for task in tasks
    ]
    return table(["exact, %", *(METHODS[method].label for method in done)], rows)


def page(records: Sequence[Record], device: str) -> str:
    """Return the page as Markdown."""
    devices = sorted({record["cost"]["device"] for record in records})
    return f"""# A language model, eleven unlike tasks

Written by `examples/benchmarks/evidence/instructions_page.py` from `instructions.jsonl`; `instructions.py` there makes
the records, on a GPU. {f"Run on {', '.join(devices)}." if devices else "It has not been run yet."}

SmolLM2-135M-Instruct, one adapter on every linear layer but the output, for questions with one answer each: software
messages into {", ".join(TRANSLATIONS)}; sums and differences; words backwards and sorted; {", ".join(GLUE)} of GLUE.
{SIZES["train"]} questions a task to train on, {SIZES["test"]} reported, split by the question's words.

{FIXED["steps"]} steps of AdamW with {FIXED["batch"]} questions of up to {FIXED["max_tokens"]} tokens, warm-up over
6 % of the steps, linear decay. The rate is the best in development ({SEARCH_STEPS} steps, seed {DEVELOPMENT_SEED}) of
{", ".join(f"{rate:g}" for rate in RATES)}. Fixed beforehand: the negative log-likelihood (NLL) of the answers' tokens
counts first, the share of answers that greedy decoding gets right to the last token second; both are means over tasks.
Mean over seeds ± half of the 95 % interval (t), the number of seeds in brackets; differences are paired by seed.

{results(records, device)}

{by_task(records, device)}

## What has been run

```text
{status(plan_for(device), records)}
```
"""


def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS / "instructions.jsonl")
    parser.add_argument("--page", type=Path, default=RESULTS / "instructions.md")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="whose runs; default: %(default)s")
    args = parser.parse_args(argv)
    args.page.write_text(page(Records(args.records).read(), args.device), encoding="utf-8")


if __name__ == "__main__":
    main()
