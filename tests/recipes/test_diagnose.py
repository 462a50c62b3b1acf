"""Do a recipe's tasks conflict? The command, on tiny models whose tasks are known."""

from __future__ import annotations

import json
import re

import pytest

from rank_experts.recipes import diagnose
from rank_experts.training.conflict import TaskConflict
from rank_experts_cli import main
from recipe_files import save_model, write_recipe

OPPOSITE = """\
model: {{name: {model}, max_length: 16}}
adapter: {{method: smora, target_modules: [query, value, dense]}}
tasks:
  same: {{train: same.jsonl, validation: same.jsonl, text: "{{sentence}}", labels: [no, yes], head: both}}
  other: {{train: other.jsonl, validation: other.jsonl, text: "{{sentence}}", labels: [no, yes], head: both}}
training: {{output_dir: out, use_cpu: true, learning_rate: 1e-2}}
"""


@pytest.mark.parametrize(("turned", "verdict"), [(1, "conflict: Route by task"), (0, "none: One LoRA is enough")])
def test_opposite_answers_to_the_same_inputs_conflict_and_equal_ones_do_not(tmp_path, turned, verdict, capsys):
    model = save_model(tmp_path / "model", "classification")
    for name, start in (("same", 0), ("other", turned)):
        rows = [{"sentence": f"w{10 + i % 2} w{20 + i % 7}", "label": (i + start) % 2} for i in range(48)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(OPPOSITE.format(model=model))
    page = tmp_path / "page.html"
    assert main(["diagnose", str(recipe), "--steps", "40", "--seeds", "3", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "2 tasks; 3 seeds, each with a training of one LoRA for all tasks and one of a LoRA for each"
    )
    assert re.search(r"This takes about \d+ s\.\n\ntask ", text)
    assert re.search(rf"^{verdict}", text, re.MULTILINE), text
    assert "layers that pull tasks apart most:\nlayer" in text
    assert verdict in page.read_text(encoding="utf-8")


def told(recipe, monkeypatch, *arguments):
    """What the command hands on."""
    seen = {}

    def noted(model, mixture, collate, **options):
        seen.update(options, model=model, mixture=mixture, batch=collate([mixture["first"][i] for i in range(2)]))
        raise ValueError("seen")

    monkeypatch.setattr(diagnose, "task_conflict", noted)
    assert main(["diagnose", str(recipe), *arguments]) == 2
    return seen


@pytest.mark.parametrize("kind", ["classification", "causal", "seq2seq"])
def test_the_recipe_says_model_heads_targets_and_rate(tmp_path, monkeypatch, kind):
    targets = {"classification": "query", "causal": "q_proj", "seq2seq": "DenseReluDense.wi"}[kind]
    recipe = write_recipe(tmp_path, kind, "lora")
    changed = [f"adapter.target_modules=[{targets}]", "training.learning_rate=3e-3"]
    seen = told(recipe, monkeypatch, *changed, "--examples", "13", "--seeds", "4", "--steps", "7")
    found = [path for path, _ in seen["model"].named_modules() if re.fullmatch(seen["target_modules"], path)]
    assert found == [path for path, _ in seen["model"].named_modules() if path.endswith(f".{targets}")]
    assert found
    assert seen["trained"] == (["heads"] if kind == "classification" else [])
    assert {name: len(rows) for name, rows in seen["mixture"].items()} == {"first": 13, "last": 13}
    assert (seen["learning_rate"], seen["steps"], list(seen["seeds"])) == (3e-3, 7, [0, 1, 2, 3])
    assert "labels" in seen["batch"]


def test_a_classifiers_pooler_is_left_out(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    seen = told(recipe, monkeypatch)
    assert seen["learning_rate"] == 1e-2
    assert "pooler" not in seen["target_modules"]
    assert "heads" not in seen["target_modules"]
    assert len(seen["mixture"]["first"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "seeds=[0]: expected 2 to 10"),
        (["--steps", "0"], "steps=0: expected at least 1"),
        (["--examples", "8"], "recipe.yaml:8: tasks.first: has 8 training examples: the diagnosis needs 12"),
        (["tasks.last.limit=5"], "recipe.yaml:12: tasks.last: has 5 training examples"),
        (["adapter.rr=1"], "override 'adapter.rr=1': adapter.rr: unknown key"),
        (["training.use_cpus=true"], "training.use_cpus: unknown key"),
    ],
)
def test_mistakes_are_said_as_ever(tmp_path, arguments, message, capsys):
    assert main(["diagnose", str(write_recipe(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_one_task_is_no_mixture(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    lines = recipe.read_text().splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(key)) for key in ("  last:", "training:"))
    recipe.write_text("\n".join(lines[:start] + lines[end:]))
    assert main(["diagnose", str(recipe)]) == 2
    assert "recipe.yaml:7: tasks: holds ['first'] alone" in capsys.readouterr().err


def test_a_disk_that_is_full_loses_the_page_alone(tmp_path, capsys, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TaskConflict, "save", full)
    arguments = ["--steps", "1", "--seeds", "2", "--html", str(tmp_path / "page.html")]
    assert main(["diagnose", str(write_recipe(tmp_path)), *arguments]) == 2
    shown = capsys.readouterr()
    assert "task visible in the inputs" in shown.out
    assert "No space left" in shown.err
