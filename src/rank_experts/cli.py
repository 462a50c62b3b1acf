"""The command line: train, evaluate, merge, export, inspect, demo.

`rank-experts --help` imports nothing heavy; every command imports what it needs when it runs. What a user can mend is
said in a line or two and ends with status 2; an interrupted training ends with 130.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RECIPE_COPY = "recipe.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; None: the process's.

    Returns:
        0; 2 where something is wrong that the message explains; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["demo"]:
        # The demo has options of its own.
        return _demo(arguments[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no more key=value once an option came between.
    if any(text.startswith("-") or "=" not in text or "overrides" not in args for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        if args.traceback:
            raise
        print(f"rank-experts {args.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rank-experts", description="Train and handle rank-expert adapters.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        own.set_defaults(command=command)
        return own

    train = add("train", _train, "Train an adapter on several tasks, as a YAML recipe says.")
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for instance training.learning_rate=1e-3")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, show examples and sizes, train nothing"
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")

    evaluate = add("evaluate", _evaluate, "Evaluate a trained adapter, task by task.")
    evaluate.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.add_argument("--adapter", type=Path, help="its folder; default: the recipe's training.output_dir")
    evaluate.add_argument("--json", type=Path, help="write the metrics there too")

    merge = add("merge", _merge, "Merge an adapter into its base model's weights, exactly, and save the model.")
    merge.add_argument("adapter", type=Path)
    merge.add_argument("out", type=Path)
    merge.add_argument("--task", help="the task to merge for, where the adapter routes by task")
    merge.add_argument("--base", help="the base model, where it is not the one that the adapter names")

    export = add("export", _export, "Write an adapter as a plain LoRA that any LoRA server loads.")
    export.add_argument("adapter", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--task", help="the task to export for, where the adapter routes by task")
    export.add_argument("--base", help="the base model, where it is not the one that the adapter names")
    export.add_argument("--calibration", type=Path, metavar="TEXT", help="a text file, a sample a line: token routers")

    inspect = add("inspect", _inspect, "Say what an adapter's files hold; needs no base model.")
    inspect.add_argument("adapter", type=Path)
    inspect.add_argument("--json", action="store_true", help="print everything, as JSON")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write the report there too, as one page with plots")

    commands.add_parser(
        "demo", help="Train LoRA, SMoRA and MoRE on four tasks, on the CPU, in minutes.", add_help=False
    )
    return parser


def _needs(extra: str, error: ImportError) -> ImportError:
    return ImportError(f"{error}. Install what this command needs: pip install 'rank-experts[{extra}]'")


def _train(args: argparse.Namespace) -> int:
    recipe, data, tokenizer = _recipe_and_data(args)
    from transformers.trainer_utils import get_last_checkpoint, set_seed

    from .assemble import build_model, build_trainer, training_arguments
    from .trainer import SaveOnInterrupt

    training = training_arguments(recipe)
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
    trainer = build_trainer(recipe, build_model(recipe, data), data, tokenizer, training)
    with SaveOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        again = " ".join(["rank-experts train", str(args.recipe), *args.overrides, "--resume"])
        print(f"Interrupted after step {trainer.state.global_step}; saved. Go on with: {again}")
        return 130
    trainer.save_model(str(out))
    if not (out / RECIPE_COPY).exists() or not args.recipe.samefile(out / RECIPE_COPY):
        shutil.copyfile(args.recipe, out / RECIPE_COPY)
    _print_metrics(trainer.evaluate(), recipe)
    print(f"The adapter is in {out}.")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    recipe, data, tokenizer = _recipe_and_data(args)
    from .assemble import build_model, build_trainer, training_arguments

    training = training_arguments(recipe, report_to=[])
    adapter = args.adapter or Path(training.output_dir or "")
    trainer = build_trainer(recipe, build_model(recipe, data, adapter), data, tokenizer, training)
    metrics = trainer.evaluate()
    if args.json is not None:
        args.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _print_metrics(metrics, recipe)
    return 0


def _recipe_and_data(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    try:
        from .prepare import prepare
        from .recipe import read_recipe
    except ImportError as error:
        raise _needs("train", error) from error
    recipe = read_recipe(args.recipe, args.overrides)
    from .assemble import load_tokenizer

    try:
        tokenizer = load_tokenizer(recipe)
    except OSError as error:
        raise FileNotFoundError(f"model.name {recipe.model.name!r} cannot be loaded: {error}") from error
    return recipe, prepare(recipe, tokenizer, args.recipe.resolve().parent), tokenizer


def _show(recipe: Any, data: Any, training: Any) -> None:
    from .assemble import adapter_config, load_base
    from .inject import inject_rank_experts
    from .tasks import TaskMixture, TaskSampler

    for name, task in data.items():
        print(f"{name}: {len(task.train):,} to train on, {len(task.validation):,} to validate on")
        print(*(f"    {line}" for line in task.shown), sep="\n")
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


def _merge(args: argparse.Namespace) -> int:
    from .assemble import load_adapted
    from .heads import HEADS_FILES
    from .merge import merge_rank_experts

    model = load_adapted(args.adapter, args.base)
    merge_rank_experts(model, task=args.task, safe_merge=True, unload=True)
    model.save_pretrained(args.out)
    for file in args.adapter.iterdir():
        if file.name in HEADS_FILES or file.name.startswith(("tokenizer", "special_tokens", "vocab")):
            shutil.copyfile(file, args.out / file.name)
    print(f"The merged model is in {args.out}.")
    return 0


def _export(args: argparse.Namespace) -> int:
    from .assemble import load_adapted
    from .export import export_lora

    model = load_adapted(args.adapter, args.base)
    options: dict[str, Any] = {}
    if args.calibration is not None:
        options["calibration"] = _calibration(args.calibration, model.name_or_path)
    report = export_lora(model, args.out, task=args.task, **options)
    if report is not None:
        print(report)
    print(f"The LoRA is in {args.out}.")
    return 0


def _calibration(file: Path, tokenizer_name: str) -> list[Any]:
    from transformers import AutoTokenizer

    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no text to calibrate with; expected a sample a line.")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chunks = [lines[i : i + 16] for i in range(0, len(lines), 16)]
    return [
        dict(tokenizer(chunk, padding=True, truncation=True, max_length=512, return_tensors="pt")) for chunk in chunks
    ]


def _inspect(args: argparse.Namespace) -> int:
    from .report import inspect_adapter

    report = inspect_adapter(args.adapter)
    if args.html is not None:
        report.save(args.html)
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if args.json else report.to_text().rstrip())
    return 0


def _demo(arguments: list[str]) -> int:
    from . import demo

    return demo.main(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
