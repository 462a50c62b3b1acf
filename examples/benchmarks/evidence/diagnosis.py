"""Does `task_conflict` say what is known? Layers of a known overlap, languages with one head and eight, and GLUE.

    python examples/benchmarks/evidence/diagnosis.py --list                 # what is done, what is left
    python examples/benchmarks/evidence/diagnosis.py --glue data/glue       # does it, writes docs/results/diagnosis.md

Expected: no conflict at overlap 0 and more room with more overlap; conflict for the languages behind one head, none
with a head for each, as `conflict` and `languages` have it; none for GLUE with a head for each, where routing was worth
nothing (`glue_small`). One thread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conflict import POINT, Layer
from encoder import TARGETS, Encoder, States
from figures import table
from language_data import CLASSES
from languages import Experiment, default_cache
from languages_plan import DATA
from rank_experts.training import task_conflict
from rank_experts.training.conflict import NOTICEABLE
from records import Record, Records, Settings, key
from runner import Planned, arguments, status, work
from teacher import Teacher

OVERLAPS = (0.0, 0.25, 0.5, 1.0)
EXAMPLES = 400
SEEDS = (0, 1, 2)
LAYER = {"learning_rate": 1e-2, "steps": 300, "batch_size": 8, "r": 8, "alpha": 8}
TEXTS = {"learning_rate": 2e-3, "steps": 150, "batch_size": 4, "r": 8, "alpha": 16}
GLUE = {"cola": ["sentence"], "mrpc": ["sentence1", "sentence2"], "rte": ["sentence1", "sentence2"]}
GLUE |= {"sst2": ["sentence"], "qnli": ["question", "sentence"]}
"""Tasks of two classes, and their columns."""
SMALL = TEXTS | {"steps": 60, "examples": 200}
MAX_TOKENS = 40


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


class Texts:
    """Tasks of texts as a mixture, and a collator that gives the lower layers' states.

    Args:
        states: Of all texts.
        labels: (N,) the answers.
        tasks: (N,) the tasks' numbers.
        names: Of the tasks.
    """

    def __init__(self, states: States, labels: Tensor, tasks: Tensor, names: Sequence[str]) -> None:
        self.states, self.labels, self.tasks = states, labels, tasks
        self.mixture = {
            name: [{"row": int(row)} for row in (tasks == number).nonzero().flatten()[:EXAMPLES]]
            for number, name in enumerate(names)
        }

    def collate(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        """Return what the classifier takes."""
        rows = torch.tensor([example["row"] for example in examples])
        return self.states.batch(rows) | {"labels": self.labels[rows], "head_ids": self.tasks[rows]}


def languages(experiment: Experiment) -> Texts:
    """Return the languages' training texts."""
    own = experiment.data.splits["train"]
    return Texts(experiment.states("train", named=True), own.labels, own.languages, experiment.data.languages)


def glue(encoder: Encoder, folder: Path) -> Texts:
    """Return some of the texts of GLUE's tasks, drawn by a fixed seed; of a pair one text, with a separator between.

    Args:
        encoder: Runs the lower layers.
        folder: Holds `<task>/train.parquet`, or `validation.parquet` where there is no training set.

    Raises:
        FileNotFoundError: A task is not there.
    """
    import pyarrow.parquet

    texts: list[str] = []
    labels: list[int] = []
    tasks: list[int] = []
    for number, (name, columns) in enumerate(GLUE.items()):
        files = [folder / name / f"{split}.parquet" for split in ("train", "validation")]
        found = next((file for file in files if file.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{files[0]} is not there. Pass GLUE's folder by --glue.")
        rows = pyarrow.parquet.read_table(found).to_pylist()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        drawn = [(" [SEP] ".join(rows[i][column] for column in columns), rows[i]["label"]) for i in order]
        lengths = map(len, encoder.tokens([text for text, _ in drawn]))
        short = [pair for pair, length in zip(drawn, lengths) if length <= MAX_TOKENS][: SMALL["examples"]]
        texts += [text for text, _ in short]
        labels += [label for _, label in short]
        tasks += [number] * len(short)
    return Texts(encoder.states(texts), torch.tensor(labels), torch.tensor(tasks), list(GLUE))


def runner(cache: Path, folder: Path | None) -> Any:
    """Return what does a run.

    Args:
        cache: Of downloads.
        folder: GLUE's.
    """
    experiment = Experiment(cache)

    def run(settings: Settings) -> Record:
        how = {name: settings[name] for name in ("learning_rate", "steps", "batch_size", "r", "alpha", "seeds")}
        if settings["of"] == "layer":
            model, mixture = layer_of(settings["overlap"])
            found = task_conflict(
                model,
                mixture,
                stacked,
                target_modules=["layer"],
                **how,
                expect=lambda s: print(f"about {s:.0f} s", flush=True),
            )
        else:
            if settings["of"] == "glue" and folder is None:
                raise ValueError("Where are GLUE's files? Pass their folder by --glue.")
            own = (
                languages(experiment)
                if folder is None or settings["of"] != "glue"
                else glue(experiment.encoder, folder)
            )
            torch.manual_seed(0)
            classes = CLASSES if settings["of"] == "languages" else 2
            model = experiment.encoder.classifier(classes, len(own.mixture) if settings["heads"] == "each" else 1)
            found = task_conflict(
                model,
                own.mixture,
                own.collate,
                target_modules=TARGETS,
                trained=["head"],
                **how,
                expect=lambda s: print(f"about {s:.0f} s", flush=True),
            )
        result = {"verdict": found.verdict, "room": found.room, "half": found.half, "visible": found.visible}
        result |= {"start": found.start.tolist(), "shared": found.shared.tolist(), "alone": found.alone.tolist()}
        result["cosines"] = {layer.path: layer.cosine for layer in found.layers}
        return {"result": result | {"common": found.common}}

    return run


def plan(records: Sequence[Record]) -> Planned:
    """Return every run."""
    common = {"examples": EXAMPLES, "seeds": list(SEEDS), "scale_of_all": "alpha / (r · √T)"}
    layers = [{"of": "layer", "overlap": overlap} | LAYER | common for overlap in OVERLAPS]
    texts = [{"of": "languages", "heads": heads, "data": DATA} | TEXTS | common for heads in ("one", "each")]
    small = {"of": "glue", "heads": "each", "tasks": list(GLUE), "max_tokens": MAX_TOKENS} | common | SMALL
    runs = [("one layer", each) for each in layers] + [("languages", each) for each in texts]
    return [*runs, ("GLUE", small)]


def title(settings: Settings) -> str:
    """Return what a run is of."""
    if settings["of"] == "layer":
        return f"one layer, overlap {settings['overlap']:g}"
    name = "languages" if settings["of"] == "languages" else "GLUE, five tasks"
    return f"{name}, {'one head' if settings['heads'] == 'one' else 'a head each'}"


def page(records: Sequence[Record]) -> str:
    """Return the page as Markdown."""
    done = {key(record["settings"]): record["result"] for record in records}
    rows, layers = [], []
    before = [each for each in records if "scale_of_all" not in each["settings"]]
    earlier = [_row(title(each["settings"]), each["result"]) for each in before]
    for _, settings in plan(records):
        name, found = title(settings), done.get(key(settings))
        if found is None:
            rows.append([name, *["not run"] * 6])
            continue
        rows.append(_row(name, found))
        known = {path: cosine for path, cosine in found["cosines"].items() if not math.isnan(cosine)}
        most = min(known, key=lambda path: known[path])
        energies = [share for share in found.get("common", {}).values() if not math.isnan(share)]
        common = [f"{statistics.fmean(energies):.0%}", f"{min(energies):.0%} … {max(energies):.0%}"] if energies else []
        spans = [f"{statistics.fmean(known.values()):+.2f}", f"{known[most]:+.2f}", f"`{most}`"]
        layers.append([name, *spans, *(common or ["not measured"] * 2)])
    head = ["tasks", "one adapter for all", "one each", "room", "of what is learnt", "task visible", "verdict"]
    below = ["tasks", "cosine, mean", "least", "in the layer", "energy in common, mean", "by layer"]
    return f"""# Does the diagnosis say what is known?

Written by `examples/benchmarks/evidence/diagnosis.py` from `diagnosis.jsonl`.

`task_conflict` on tasks of which it is known: [one layer](conflict.md) whose tasks' input directions overlap by a known
share; the [languages](languages.md) behind one head, which conflict, and with a head each, which do not; and five tasks
of [GLUE](glue_small.md) with a head each, where routing was level with LoRA. {EXAMPLES} examples a task, a quarter held
out; {len(SEEDS)} seeds, the interval is 95 % (t). Losses are held-out ones.

{table(head, rows)}

"conflict" is said where the room's interval lies above {NOTICEABLE:.0%} of what training takes off the loss, "none"
where it lies below, and "unclear" else. GLUE has {SMALL["examples"]} examples a task of at most {MAX_TOKENS} tokens and
{SMALL["steps"]} steps, the languages {TEXTS["steps"]} steps.

## The scale of the adapter for all

It has T times the ranks. At the scale of an adapter for each its seeds came out so far apart, for the languages with a
head each, that it could not be told. Its scale is now that over √T (rank-stabilised, arXiv 2312.03732). These runs were
at the same scale:

{table(head, earlier)}

## What the gradients say

At the end of the shared training, by layer: the cosine between two tasks' gradients, and the share of the tasks'
gradient energy in their common subspace. They decide nothing.

{table(below, layers)}

```text
{status(plan, records)}
```
"""


def _row(name: str, found: dict[str, Any]) -> list[str]:
    start, shared, alone = (statistics.fmean(found[way]) for way in ("start", "shared", "alone"))
    room = f"{found['room']:+.4f} ± {found['half']:.4f}"
    share = f"{found['room'] / (start - min(shared, alone)):+.0%}"
    return [name, f"{shared:.4f}", f"{alone:.4f}", room, share, f"{found['visible']:.0%}", found["verdict"]]


def main(argv: list[str] | None = None) -> None:
    """Print the status, or do what is left; write the page."""
    parser = arguments(__doc__, "diagnosis")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of downloads; default: %(default)s")
    parser.add_argument("--glue", type=Path, metavar="FOLDER", help="GLUE's, a folder a task, for its run")
    args = parser.parse_args(argv)
    records = Records(args.records)
    if not args.list:
        torch.set_num_threads(1)
        work(plan, runner(args.cache, args.glue), records, args.groups, args.limit)
        args.records.with_suffix(".md").write_text(page(records.read()), encoding="utf-8")
    print(status(plan, records.read()))


if __name__ == "__main__":
    main()
