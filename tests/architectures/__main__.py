"""Try every architecture, one process a model, and write docs/results/architectures.json; goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import peft
import torch
import transformers
from transformers.models.llama import modeling_llama  # noqa: F401  what every child would import
from transformers.models.vit import modeling_vit  # noqa: F401

from .check import check
from .shrink import architectures

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "architectures.json"


def in_a_process(model_type: str, class_name: str, seconds: int) -> dict:
    """Return what `check` found, from a child that may hang or die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(seconds)
        with os.fdopen(writing, "w") as pipe:
            try:
                json.dump(check(model_type, class_name), pipe)
            except BaseException as error:
                json.dump({"verdict": "not tried", "why": f"{type(error).__name__}: {str(error)[:200]}"}, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"verdict": "not tried", "why": f"took more than {seconds} s, or died"}


SAID = {
    "works": "everything that is tried: injection, forward, training, checkpointing, saving and loading, mixed tasks "
    "row by row, generating, merging",
    "works with a limit": "all but mixed tasks at some lengths, which are refused by an error that names the layer",
    "refused": "the adapter on all linear layers is refused by name; LoRA fails there too",
    "as LoRA": "what does not work does not work with PEFT's LoRA either",
    "broken": "LoRA works and we do not",
    "not tried": "no small model of it could be made that runs at all",
}


def page(found: dict) -> str:
    """Write the architectures by verdict, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# Every architecture", ""]
    lines += [
        f"Written by `make architectures`: each of transformers' architectures, shrunk, with {versions}; adapters on"
    ]
    lines += ["all linear layers, with a token gate and with a task gate, and PEFT's LoRA as the control.", ""]
    lines += ["| what works | number | architectures |", "| --- | --- | --- |"]
    for verdict, said in SAID.items():
        names = [name for name, each in found["architectures"].items() if each["verdict"] == verdict]
        if names:
            lines.append(f"| **{verdict}**: {said} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the arguments, try, and write after each architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="model types; None: all that the records lack")
    parser.add_argument("--seconds", type=int, default=120, help="for each")
    parser.add_argument("--anew", action="store_true", help="forget the records first")
    parser.add_argument("--again", action="store_true", help="those that could not be tried, and those that are broken")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {} if args.anew or not RESULTS.exists() else json.loads(RESULTS.read_text())["architectures"]
    if args.again:
        known = {
            name: found for name, found in known.items() if found["verdict"] not in ("not tried", "broken", "as LoRA")
        }
    for model_type, (task, class_name) in architectures().items():
        if model_type in known if args.only is None else model_type not in args.only:
            continue
        known[model_type] = {"class": class_name, "task": task, **in_a_process(model_type, class_name, args.seconds)}
        print(model_type, known[model_type]["verdict"], known[model_type].get("why", ""), flush=True)
        versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
        found = {"versions": versions, "architectures": dict(sorted(known.items()))}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found["architectures"].items())
        RESULTS.write_text(f'{{"versions": {json.dumps(versions)},\n"architectures": {{\n{lines}\n}}}}\n')
    RESULTS.with_suffix(".md").write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
