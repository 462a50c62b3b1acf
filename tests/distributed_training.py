"""Run by test_trainer.py under torchrun: what every rank of a `RankExpertTrainer` sees, and where it resumes.

torchrun --nproc_per_node 2 tests/distributed_training.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_trainer import METRIC, TASKS, arguments, classifier, examples

from rank_experts.training.mixtures import TaskMixture
from rank_experts.training.trainer import RankExpertTrainer


class Recording(RankExpertTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["task_ids"].tolist(), inputs["input_ids"].tolist())
        self.seen.append([(task, row) for task, row in rows])
        return super().training_step(model, inputs, *args, **kwargs)


def run(folder: Path, steps: int, resume: Path | None = None):
    settings = dict(
        max_steps=steps, save_strategy="steps", save_steps=8, lr_scheduler_type="constant", ddp_backend="gloo"
    )
    trainer = Recording(
        classifier(),
        arguments(folder, **settings),
        train_dataset=TaskMixture({name: examples(name) for name in TASKS}),
        eval_dataset=TaskMixture({name: examples(name, 10) for name in TASKS}),
        metrics=METRIC,
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


if __name__ == "__main__":
    out = Path(sys.argv[1])
    # 48 examples, 2 ranks, 4 a batch: 6 steps an epoch, so that step 8 lies in the second.
    whole = run(out / "whole", 10)
    metrics = whole.evaluate()
    resumed = run(out / "resumed", 10, out / "whole" / "checkpoint-8")
    same = all(
        torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )
    result = {"seen": whole.seen, "resumed": resumed.seen, "same": same, "mean": metrics["eval_mean"]}
    (out / f"rank{whole.args.process_index}.json").write_text(json.dumps(result))
