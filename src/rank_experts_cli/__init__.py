"""The command line: diagnose, train, evaluate, merge, export, inspect.

A package of its own, because importing `rank_experts` imports torch and PEFT, which takes seconds: help and mistyped
arguments are answered without. The library is imported when a command runs. What a user can mend is said in a line or
two and ends with status 2; an interrupted training ends with 130.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

_RECIPE = "a YAML file: model, adapter, tasks and training, see docs/training.md"
_OVERRIDES = "values that replace the recipe's, for instance training.learning_rate=1e-3"
_ADAPTER = "the adapter's folder"
_EXTRAS = {"diagnose": "train", "train": "train", "evaluate": "train"}
_BASE = "the base model, where it is not the one that the adapter names"
_CODE = "run the code that comes with the base model; never without this"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; None: the process's.

    Returns:
        0; 2 where something is wrong that the message explains; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no more key=value once an option came between.
    if any(text.startswith("-") or "=" not in text or "overrides" not in args for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        return getattr(importlib.import_module("rank_experts.recipes.commands"), args.name)(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        extra = _EXTRAS.get(args.name) if isinstance(error, ModuleNotFoundError) else None
        hint = f". Install what this command needs: pip install 'rank-experts[{extra}]'" if extra else ""
        # Messages may name what strangers' files hold, which must not speak to the terminal.
        shown = "".join(
            char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
            for char in str(error)
        )
        print(f"rank-experts {args.name}: {shown}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rank-experts", description="Train and handle rank-expert adapters.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
        return own

    diagnose = add(
        "diagnose", "Say whether a recipe's tasks are in each other's way: whether routing can win anything."
    )
    diagnose.add_argument("recipe", type=Path, metavar="RECIPE", help=_RECIPE)
    diagnose.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    diagnose.add_argument(
        "--examples", type=int, default=400, metavar="N", help="of each task, at most; default: %(default)s"
    )
    diagnose.add_argument("--steps", type=int, default=100, metavar="N", help="of a training; default: %(default)s")
    diagnose.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="2 to 10; more narrow the interval; default: %(default)s"
    )
    diagnose.add_argument("--html", type=Path, metavar="FILE", help="write the report there too, as one page")

    train = add("train", "Train an adapter on several tasks, as a YAML recipe says.")
    train.add_argument("recipe", type=Path, metavar="RECIPE", help=_RECIPE)
    train.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, show examples and sizes, train nothing"
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")

    evaluate = add("evaluate", "Evaluate a trained adapter, task by task.")
    evaluate.add_argument("recipe", type=Path, metavar="RECIPE", help=_RECIPE)
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    evaluate.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="the adapter's; default: the recipe's training.output_dir"
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there too")

    merge = add("merge", "Merge an adapter into its base model's weights, exactly, and save the model.")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    merge.add_argument("out", type=Path, metavar="OUT", help="the folder to save the merged model in")
    merge.add_argument("--task", help="the task to merge for, where the adapter routes by task")
    merge.add_argument("--base", metavar="MODEL", help=_BASE)
    merge.add_argument("--trust-remote-code", action="store_true", help=_CODE)

    export = add("export", "Write an adapter as a plain LoRA that any LoRA server loads.")
    export.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    tasks = export.add_mutually_exclusive_group()
    tasks.add_argument("--task", help="the task to export for, where the adapter routes by task")
    tasks.add_argument("--all-tasks", action="store_true", help="write a folder for each task into OUT")
    export.add_argument("--base", metavar="MODEL", help=_BASE)
    export.add_argument("--trust-remote-code", action="store_true", help=_CODE)
    export.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text, a sample a line: token-routed adapters need it"
    )

    inspect = add("inspect", "Say what an adapter's files hold; needs no base model.")
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    inspect.add_argument("--json", action="store_true", help="print everything, as JSON")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write the report there too, as one page with plots")
    return parser
