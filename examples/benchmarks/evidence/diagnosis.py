"""Does `task_conflict` say what is known? One layer whose overlap is known, and the languages with one head and eight.

    python examples/benchmarks/evidence/diagnosis.py --list      # what is done, what is left
    python examples/benchmarks/evidence/diagnosis.py             # does what is left, writes docs/results/diagnosis.md

Expected: no conflict at overlap 0 and more room with more overlap; conflict for the languages behind one head, none
with a head for each, as `conflict` and `languages` have it. One thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conflict import POINT, Layer
from encoder import TARGETS
from figures import table
from language_data import CLASSES
from languages import Experiment, default_cache
from languages_plan import DATA
from rank_experts.training import task_conflict
from records import Record, Records, Settings, key
from runner import Planned, arguments, status, work
from teacher import Teacher

OVERLAPS = (0.0, 0.25, 0.5, 1.0)
EXAMPLES = 400
SEEDS = (0, 1, 2)
LAYER = {"learning_rate": 1e-2, "steps": 300, "batch_size": 8, "r": 8, "alpha": 8}
LANGUAGES = {"learning_rate": 2e-3, "steps": 150, "batch_size": 4, "r": 8, "alpha": 16, "data": DATA}


def layer_of(overlap: float) -> tuple[Layer, dict[str, list[dict[str, Tensor]]]]:
    """Return a layer and tasks of a known overlap, a few hundred examples each."""
    names = ("tasks", "rank", "visible", "noise", "width")
    teacher = Teacher("subspaces", overlap=overlap, seed=0, **{name: POINT[name] for name in names})
    torch.manual_seed(0)
    model, generator = Layer(teacher.width).requires_grad_(False), torch.Generator().manual_seed(0)
    mixture = {}
    for task in range(teacher.tasks):
        x, update, _ = teacher.batch(EXAMPLES, generator, task)
        mixture[f"task {task}"] = [{"x": a, "labels": b} for a, b in zip(x, model.layer(x) + update)]
    return model, mixture


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of examples of a layer."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Languages:
    """The languages' training texts as a mixture, and a collator that gives the lower layers' states.

    Args:
        experiment: Holds the data.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.texts = experiment.data.splits["train"]
        self.states = experiment.states("train", named=True)
        self.mixture = {
            name: [{"row": int(row)} for row in (self.texts.languages == number).nonzero().flatten()[:EXAMPLES]]
            for number, name in enumerate(experiment.data.languages)
        }

    def collate(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        """Return what the classifier takes."""
        rows = torch.tensor([example["row"] for example in examples])
        batch = self.states.batch(rows)
        return batch | {"labels": self.texts.labels[rows], "head_ids": self.texts.languages[rows]}


def runner(cache: Path) -> Any:
    """Return what does a run."""
    experiment = Experiment(cache)

    def run(settings: Settings) -> Record:
        how = {name: settings[name] for name in ("learning_rate", "steps", "batch_size", "r", "alpha", "seeds")}
        if settings["of"] == "layer":
            model, mixture = layer_of(settings["overlap"])
            found = task_conflict(model, mixture, stacked, target_modules=["layer"], **how)
        else:
            own = Languages(experiment)
            torch.manual_seed(0)
            model = experiment.encoder.classifier(CLASSES, len(own.mixture) if settings["heads"] == "each" else 1)
            found = task_conflict(model, own.mixture, own.collate, target_modules=TARGETS, trained=["head"], **how)
        result = {"verdict": found.verdict, "room": found.room, "half": found.half, "visible": found.visible}
        result |= {"start": found.start.tolist(), "shared": found.shared.tolist(), "alone": found.alone.tolist()}
        off = ~torch.eye(len(found.tasks), dtype=torch.bool)
        return {"result": result | {"cosines": {path: float(c[off].nanmean()) for path, c in found.cosines.items()}}}

    return run


def plan(records: Sequence[Record]) -> Planned:
    """Return every run."""
    common = {"examples": EXAMPLES, "seeds": list(SEEDS)}
    layers = [{"of": "layer", "overlap": overlap} | LAYER | common for overlap in OVERLAPS]
    languages = [{"of": "languages", "heads": heads} | LANGUAGES | common for heads in ("one", "each")]
    return [("one layer", each) for each in layers] + [("languages", each) for each in languages]


def page(records: Sequence[Record]) -> str:
    """Return the page as Markdown."""
    done = {key(record["settings"]): record["result"] for record in records}
    rows = []
    for _, settings in plan(records):
        name = f"one layer, overlap {settings['overlap']:g}" if settings["of"] == "layer" else "languages, "
        if settings["of"] == "languages":
            name += "one head" if settings["heads"] == "one" else "a head each"
        found = done.get(key(settings))
        if found is None:
            rows.append([name, *["not run"] * 6])
            continue
        shared, alone = (sum(found[way]) / len(found[way]) for way in ("shared", "alone"))
        room = f"{found['room']:+.4f} ± {found['half']:.4f}"
        start = f"{sum(found['start']) / len(found['start']):.4f}"
        rows.append([name, start, f"{shared:.4f}", f"{alone:.4f}", room, f"{found['visible']:.0%}", found["verdict"]])
    head = ["tasks", "loss, untrained", "one adapter for all", "one each", "room", "task visible", "verdict"]
    return f"""# Does the diagnosis say what is known?

Written by `examples/benchmarks/evidence/diagnosis.py` from `diagnosis.jsonl`.

`task_conflict` on tasks of which it is known: [one layer](conflict.md) whose tasks' input directions overlap by a known
share, and the [languages](languages.md) behind one head, which conflict, and with a head each, which do not. {EXAMPLES}
examples a task, a quarter held out; {len(SEEDS)} seeds, the interval is 95 % (t).

{table(head, rows)}

```text
{status(plan, records)}
```
"""


def main(argv: list[str] | None = None) -> None:
    """Print the status, or do what is left; write the page."""
    parser = arguments(__doc__, "diagnosis")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of downloads; default: %(default)s")
    args = parser.parse_args(argv)
    records = Records(args.records)
    if not args.list:
        torch.set_num_threads(1)
        work(plan, runner(args.cache), records, args.groups, args.limit)
        args.records.with_suffix(".md").write_text(page(records.read()), encoding="utf-8")
    print(status(plan, records.read()))


if __name__ == "__main__":
    main()
