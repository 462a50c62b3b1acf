"""Real text, conflicting tasks: eight languages behind one head of MiniLM. Does routing learn faster, and end better?

    python examples/benchmarks/evidence/languages.py --list      # what is done, what is left
    python examples/benchmarks/evidence/languages.py             # does what is left; start it twice for two cores
    python examples/benchmarks/evidence/languages_page.py        # docs/results/languages.md from the records

`language_data.py` says what the tasks are, `languages_plan.py` what is run. The upper three layers of the encoder are
adapted, the lower three run once and are kept. AdamW, batches of 32, warm-up over 6 % of the steps, linear decay, each
length of training with a schedule of its own; the head has a rate of its own. One thread a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

import catalogues
import language_data
from batching import batches
from encoder import Encoder, States
from language_data import Data
from language_training import Training
from languages_plan import DATA, plan
from methods import METHODS
from records import Record, Records, Settings
from runner import arguments, status, work

POINTS = 10
"""Of a learning curve; the last is the end."""
SPARSE = 4
"""A curve's points before the end read every fourth example."""


class Experiment:
    """Holds the data and the lower layers' states, made when a run first needs them; does a run.

    Args:
        cache: Folder of the downloaded wheels, and of the states.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._states: dict[tuple[str, bool], States] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder in two parts."""
        return Encoder()

    @cached_property
    def data(self) -> Data:
        """The examples.

        Raises:
            ValueError: They are not those of the records.
        """
        catalogues.download(self.cache)
        messages = catalogues.read(self.cache)
        texts = sorted({text for own in messages.values() for text in own})
        longest = max(messages, key=lambda language: len(self.encoder.tokens([f"{language}:"])[0]))
        tokens = self.encoder.tokens([f"{longest}: {text}" for text in texts])
        fits = [text for text, ids in zip(texts, tokens) if len(ids) <= language_data.MAX_TOKENS]
        data = language_data.build(messages, fits)
        if data.digest != DATA:
            raise ValueError(
                f"The examples' digest is {data.digest}, that of the records {DATA}: the wheels in {self.cache} or "
                "language_data.py differ. Remove the wheels and try again; where the data are meant to change, set "
                "DATA in languages_plan.py, and every run is done anew."
            )
        return data

    def states(self, split: str, named: bool) -> States:
        """Return the lower layers' states of a split's texts, with the languages' names before them or without."""
        if (split, named) not in self._states:
            file = self.cache / f"states-{self.data.digest}-{split}{'' if named else '-unnamed'}.pt"
            if not file.exists():
                own, names = self.data.splits[split], self.data.languages
                texts = [f"{names[i]}: {text}" if named else text for i, text in zip(own.languages.tolist(), own.texts)]
                self.encoder.states(texts).save(file)
            self._states[split, named] = States.load(file)
        return self._states[split, named]

    def train(self, settings: Settings) -> Iterator[tuple[int, Training]]:
        """Train once; yield (step, training) at the points of the learning curve, the end included."""
        states, steps = self.states("train", settings["named"]), settings["steps"]
        training = Training(self.encoder, self.data, METHODS[settings["method"]], settings)
        for step, batch in enumerate(batches(states.lengths, settings["batch"], steps, settings["seed"]), start=1):
            training.step(states, batch)
            if step == steps or step % max(1, steps // POINTS) == 0:
                yield step, training

    def run(self, settings: Settings) -> Record:
        """Train and evaluate once."""
        examples, held_out = self.data.splits[settings["split"]], self.states(settings["split"], settings["named"])
        rows, curve = torch.arange(len(examples)), []
        for step, training in self.train(settings):
            if step < settings["steps"]:
                curve.append([step, *training.evaluate(examples, held_out, rows[::SPARSE])[:2]])
        nll, accuracy, by_language = training.evaluate(examples, held_out, rows)
        result = {"nll": nll, "accuracy": accuracy, "nll_by_language": by_language}
        result["curve"] = [*curve, [settings["steps"], nll, accuracy]]
        return {"result": result, "cost": {"trained_parameters": training.trained_parameters}}


def default_cache() -> Path:
    """Return the folder for what is downloaded, outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rank-experts" / "catalogues"


def main(argv: list[str] | None = None) -> None:
    """Print the status, or do what is left."""
    parser = arguments(__doc__, "languages")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of downloads; default: %(default)s")
    args = parser.parse_args(argv)
    records = Records(args.records)
    if not args.list:
        torch.set_num_threads(1)
        work(plan, Experiment(args.cache).run, records, args.groups, args.limit)
    print(status(plan, records.read()))


if __name__ == "__main__":
    main()
