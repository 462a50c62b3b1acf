"""What the commands of the command line do; `rank_experts_cli` reads the arguments and calls these.

Every command imports what it needs when it runs, so that an extra that is missing stops only the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

RECIPE_COPY = "recipe.yaml"

# What tokenizers of transformers write; a merged model takes these along, and nothing else that lies there.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_MAX_TOKENIZER_BYTES = 2**28


def train(args: argparse.Namespace) -> int:
    """Train an adapter, or with `dry_run` show the job; return 0, or 130 after Ctrl-C."""
    recipe = _recipe(args)
    from transformers.trainer_utils import get_last_checkpoint, set_seed

    from ..training.callbacks import SaveOnInterrupt
    from .assemble import build_model, build_trainer, training_arguments

    training = training_arguments(recipe)
    data, tokenizer = _data(args, recipe)
    out = Path(training.output_dir or "")
    if args.dry_run:
        _show(recipe, data, training)
        return 0
    checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
    if args.resume and checkpoint is None:
        raise ValueError(f"{out} holds no checkpoint to resume from. Train without --resume.")
    if checkpoint is not None and not args.resume:
        raise ValueError(f"{out} holds {Path(checkpoint).name}. Go on with --resume, or choose another output_dir.")
    # Before the adapter and the heads are drawn; `Trainer` would set it only after.
    set_seed(training.seed)
    resumed = None if checkpoint is None else Path(checkpoint)
    trainer = build_trainer(recipe, build_model(recipe, data, checkpoint=resumed), data, tokenizer, training)
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        again = " ".join(["rank-experts train", str(args.recipe), *args.overrides, "--resume"])
        print(f"Interrupted after step {trainer.state.global_step}; saved. Go on with: {again}")
        return 130
    trainer.save_model(str(out))
    copied = (out / RECIPE_COPY).exists() and args.recipe.samefile(out / RECIPE_COPY)
    if trainer.args.should_save and not copied:  # Of several processes one makes the folder.
        shutil.copyfile(args.recipe, out / RECIPE_COPY)
    _print_metrics(trainer.evaluate(), recipe)
    print(f"The adapter is in {out}.")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate an adapter, task by task."""
    recipe = _recipe(args)
    from .assemble import build_model, build_trainer, training_arguments

    training = training_arguments(recipe, report_to=[])
    data, tokenizer = _data(args, recipe)
    adapter = args.adapter or Path(training.output_dir or "")
    trainer = build_trainer(recipe, build_model(recipe, data, adapter), data, tokenizer, training)
    metrics = trainer.evaluate()
    if args.json is not None:
        args.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _print_metrics(metrics, recipe)
    return 0


def diagnose(args: argparse.Namespace) -> int:
    """Say whether the tasks of a recipe conflict."""
    recipe = _recipe(args)
    from .assemble import training_arguments
    from .diagnose import diagnose_recipe

    training = training_arguments(recipe, report_to=[])
    data, tokenizer = _data(args, recipe)
    each = f"{args.seeds} seeds, each with a training of one LoRA for all tasks and one of a LoRA for each"
    print(f"{len(data)} tasks; {each}, {args.steps} steps.", flush=True)
    found = diagnose_recipe(
        recipe,
        data,
        tokenizer,
        device=training.device,
        examples=args.examples,
        steps=args.steps,
        seeds=args.seeds,
        expect=lambda seconds: print(f"This takes about {_duration(seconds)}.\n", flush=True),
    )
    print(found)
    if args.html is not None:
        found.save(args.html)
    return 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _recipe(args: argparse.Namespace) -> Any:
    from .recipe import read_recipe

    return read_recipe(args.recipe, args.overrides)


def _data(args: argparse.Namespace, recipe: Any) -> tuple[Any, Any]:
    from .assemble import load_tokenizer
    from .prepare import prepare

    tokenizer = load_tokenizer(recipe)
    return prepare(recipe, tokenizer, args.recipe.resolve().parent), tokenizer


def _show(recipe: Any, data: Any, training: Any) -> None:
    from ..messages import printable
    from ..training.mixtures import TaskMixture, TaskSampler
    from ..tuner.injection import inject_rank_experts
    from .assemble import adapter_config, load_base

    for name, task in data.items():
        print(f"{name}: {len(task.train):,} to train on, {len(task.validation):,} to validate on")
        print(*(f"    {printable(line)}" for line in task.shown), sep="\n")
        if task.cut:
            print(f"    {task.cut:.1%} of the training examples are cut at max_length={recipe.model.max_length}")
    base = load_base(recipe, meta=True)
    total = sum(p.numel() for p in base.parameters())
    inject_rank_experts(base, adapter_config(recipe, base), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    ids = TaskMixture({name: task.train for name, task in data.items()}).task_ids
    batch = training.per_device_train_batch_size
    sampler = TaskSampler(
        ids,
        batch,
        recipe.data.sampling,
        recipe.data.temperature,
        mixed=recipe.data.batches == "mixed",
        epoch_size=recipe.data.epoch_size,
        num_replicas=training.world_size,
    )
    updates = -(-sampler.batches_per_epoch // training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else round(training.num_train_epochs * updates)
    tokens = sum(sum(map(len, task.train["input_ids"])) for task in data.values()) / len(ids)
    per_step = batch * training.world_size * training.gradient_accumulation_steps
    shares = {list(data)[task]: count for task, count in sampler.counts().items()}
    print(f"adapter: {trained:,} parameters to train beside {total:,} frozen ones ({trained / total:.2%})")
    print(f"an epoch: {updates:,} steps of {per_step} examples: {', '.join(f'{k} {v:,}' for k, v in shares.items())}")
    print(f"the job: {steps:,} steps, {steps * per_step:,} examples, about {steps * per_step * tokens:,.0f} tokens")
    print("Everything fits. Leave --dry-run out to train.")


def _print_metrics(metrics: dict[str, float], recipe: Any) -> None:
    wide = max(map(len, [*recipe.tasks, "mean"]))
    for name, task in recipe.tasks.items():
        found = [f"{metric} {metrics[f'eval_{name}_{metric}']:.4f}" for metric in task.metrics(recipe.model.kind)]
        print(f"{name:{wide}}  {', '.join(found)}")
    print(f"{'mean':{wide}}  {metrics['eval_mean']:.4f}")


def merge(args: argparse.Namespace) -> int:
    """Merge an adapter and save the model."""
    from ..convert.merge import merge_rank_experts
    from ..files.heads import HEADS_FILES
    from ..storage.pair import read_file
    from ..storage.staging import write_files
    from .adapted import load_adapted

    # Read first: a link out of the folder, or a folder where a file should be, is said before the work.
    beside = {
        name: [read_file(args.adapter, name, _MAX_TOKENIZER_BYTES)]
        for name in (*HEADS_FILES, *TOKENIZER_FILES)
        if os.path.lexists(args.adapter / name)
    }
    model = load_adapted(args.adapter, args.base, args.trust_remote_code)
    merge_rank_experts(model, task=args.task, safe_merge=True, unload=True)
    model.save_pretrained(args.out)
    write_files(args.out, beside)
    print(f"The merged model is in {args.out}.")
    return 0


def export(args: argparse.Namespace) -> int:
    """Export an adapter as a plain LoRA, or as one for each task."""
    from ..convert.export import export_lora, export_loras
    from ..files.loading import read_config
    from .adapted import load_adapted

    tasks = read_config(args.adapter).tasks or []
    if len(tasks) > 1 and args.task is None and not args.all_tasks:
        raise ValueError(
            f"{args.adapter} knows the tasks {tasks}: choose one with --task, or write a folder for each with "
            "--all-tasks."
        )
    model = load_adapted(args.adapter, args.base, args.trust_remote_code)
    if args.all_tasks:
        export_loras(model, args.out)
        print(f"In {args.out} is a LoRA for each task.")
        return 0
    options: dict[str, Any] = {}
    if args.calibration is not None:
        options["calibration"] = _calibration(args.calibration, model.name_or_path, args.trust_remote_code)
    report = export_lora(model, args.out, task=args.task, **options)
    if report is not None:
        print(report)
    print(f"The LoRA is in {args.out}.")
    return 0


def _calibration(file: Path, tokenizer_name: str, trust_remote_code: bool) -> list[Any]:
    from transformers import AutoTokenizer

    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no text to calibrate with; expected a sample a line.")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chunks = [lines[i : i + 16] for i in range(0, len(lines), 16)]
    return [
        dict(tokenizer(chunk, padding=True, truncation=True, max_length=512, return_tensors="pt")) for chunk in chunks
    ]


def inspect(args: argparse.Namespace) -> int:
    """Print the report on an adapter's files."""
    from ..reports.report import inspect_adapter

    report = inspect_adapter(args.adapter)
    if args.html is not None:
        report.save(args.html)
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if args.json else report.to_text().rstrip())
    return 0
