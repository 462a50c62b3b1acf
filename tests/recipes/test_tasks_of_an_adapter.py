"""An adapter keeps its tasks' ids whatever recipe evaluates it or trains it on."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import models
from helpers import task_config, token_config
from rank_experts import inject_rank_experts, save_rank_experts
from rank_experts.files.loading import read_config
from rank_experts.recipes.assemble import build_model, build_trainer, load_tokenizer
from rank_experts.recipes.prepare import PreparedTask
from rank_experts.recipes.recipe import Recipe
from rank_experts.training.heads import HeadSpec, MultiTaskClassifier
from rank_experts_cli import main
from recipe_files import save_model, write_recipe

NAMES = ["a", "b", "c", "d"]
HEADS = {
    "a": HeadSpec(["x", "y"]),
    "b": HeadSpec(["x", "y"]),
    "c": HeadSpec(["x", "y", "z"]),
    "d": HeadSpec(offset=1.0, scale=2.0),
}


def examples(name, kind):
    generator = torch.Generator().manual_seed(NAMES.index(name))
    rows = torch.randint(2, models.VOCAB, (8, 5), generator=generator).tolist()
    return Dataset.from_list(
        [
            {
                "input_ids": row,
                "attention_mask": [1] * 5,
                "labels": (float(row[0]) if name == "d" else row[0] % 2) if kind == "classification" else row,
            }
            for row in rows
        ]
    )


def recipe_and_data(kind, model, names, gate):
    tasks = {
        name: {"text": "{x}", "regression": name == "d"}
        if kind == "classification"
        else {"prompt": "", "target": "{x}", "metric": "accuracy"}
        for name in names
    }
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(model), "kind": kind},
            "adapter": {"method": "more" if gate == "task" else "smora", "r": 4},
            "tasks": tasks,
        }
    )
    data = {
        name: PreparedTask(
            examples(name, kind), examples(name, kind), HEADS[name] if kind == "classification" else None, [], 0.0
        )
        for name in names
    }
    return recipe, data


def build(kind, gate, tasks):
    """An adapted model with random values everywhere, whose tasks are numbered as given."""
    encoder = models.bert().bert if kind == "classification" else models.llama()
    options = {"target_modules": ["query", "value", "q_proj", "v_proj"]}
    config = task_config(tasks=tasks, **options) if gate == "task" else token_config(r=4, top_k=2, **options)
    inject_rank_experts(encoder, config)
    if kind != "classification":
        return encoder
    torch.manual_seed(2)
    return MultiTaskClassifier(encoder, {name: HEADS[name] for name in tasks})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_model(folder / kind, kind) for kind in ("classification", "causal")}


RECIPES = st.permutations(NAMES).flatmap(
    lambda known: st.tuples(
        st.integers(1, 4).map(lambda count: list(known[:count])),
        st.permutations(NAMES),
        st.integers(1, 4),
    )
)


@given(RECIPES, st.sampled_from(["classification", "causal"]), st.sampled_from(["task", "token"]))
@settings(max_examples=25, deadline=None)
def test_any_recipe_scores_an_adapters_tasks_as_the_adapter_numbers_them(tmp_path_factory, bases, drawn, kind, gate):
    known, order, count = drawn
    names = list(order[:count])
    folder = tmp_path_factory.mktemp("adapter")
    model = build(kind, gate, known).eval()
    save_rank_experts(model.encoder if kind == "classification" else model, folder)
    if kind == "classification":
        model.save_heads(folder)
    recipe, data = recipe_and_data(kind, bases[kind], names, gate)
    knows_tasks = kind == "classification" or gate == "task"
    if knows_tasks and set(names) - set(known):
        with pytest.raises(ValueError, match="is unknown to the adapter in"):
            build_model(recipe, data, folder)
        return
    loaded = build_model(recipe, data, folder).eval()
    arguments = TrainingArguments(str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = build_trainer(recipe, loaded, data, load_tokenizer(recipe), arguments)
    for dataset in (trainer.train_dataset, *trainer.eval_dataset.values()):
        for row in (dataset[0], dataset[len(dataset) - 1]):
            batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask")}
            # The rows of a task are known by their content; the model that was saved says what they are worth.
            own = next(name for name in names if row["input_ids"] in examples(name, kind)["input_ids"])
            task_id = torch.tensor([known.index(own)]) if knows_tasks else None
            ids = {"task_ids": torch.tensor([row["task_ids"]])} if knows_tasks else {}
            expected = model(**batch, **({} if task_id is None else {"task_ids": task_id})).logits
            torch.testing.assert_close(loaded(**batch, **ids).logits, expected)


def test_classes_that_a_recipe_numbers_otherwise_are_refused(tmp_path, bases):
    model = build("classification", "token", NAMES)
    save_rank_experts(model.encoder, tmp_path)
    model.save_heads(tmp_path)
    for labels, is_refused in ((["y", "x", "z"], True), (None, True), (["x", "y"], False), (["x", "y", "z"], False)):
        recipe, data = recipe_and_data("classification", bases["classification"], ["c"], "token")
        data["c"].head = HeadSpec(labels)
        if is_refused:
            with pytest.raises(ValueError, match=r"Task 'c': the adapter in .* predicts the classes \['x', 'y', 'z'\]"):
                build_model(recipe, data, tmp_path)
        else:
            build_model(recipe, data, tmp_path)


def reordered(recipe, names):
    """The same recipe with some of its tasks, in this order."""
    text = recipe.read_text()
    head, rest = text.split("tasks:\n")
    first, rest = rest.split("  last:\n")
    last, tail = rest.split("training:\n")
    sections = {"first": first, "last": "  last:\n" + last}
    file = recipe.parent / ("_".join(names) + ".yaml")
    file.write_text(head + "tasks:\n" + "".join(sections[name] for name in names) + "training:\n" + tail)
    return file


@pytest.mark.parametrize("method", ["more", "smora"])
def test_evaluate_scores_a_task_as_training_did(tmp_path, method, capsys):
    recipe = write_recipe(tmp_path, method=method)
    assert main(["train", str(recipe)]) == 0
    shown = {}
    for names in [["first", "last"], ["last", "first"], ["last"], ["first"]]:
        file = tmp_path / "metrics.json"
        assert main(["evaluate", str(reordered(recipe, names)), "--json", str(file)]) == 0
        shown["+".join(names)] = json.loads(file.read_text())
    whole = shown.pop("first+last")
    for (names, metrics), key in itertools.product(shown.items(), ["loss", "accuracy"]):
        for name in names.split("+"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(whole[f"eval_{name}_{key}"])
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(recipe.read_text().replace("  last:\n", "  lost:\n"))
    capsys.readouterr()
    assert main(["evaluate", str(renamed)]) == 2
    assert "Task 'lost' is unknown to the adapter" in capsys.readouterr().err


def test_training_goes_on_in_the_adapters_order(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    steps = ["training.save_steps=2", "training.max_steps=2", "training.save_strategy=steps"]
    assert main(["train", str(recipe), *steps]) == 0
    for names in (["last", "first"], ["last"]):
        file = reordered(recipe, names)
        steps = ["training.save_steps=2", f"training.max_steps={6 - len(names)}", "training.save_strategy=steps"]
        assert main(["train", str(file), *steps, "--resume"]) == 0
        assert read_config(tmp_path / "out").tasks == ["first", "last"]
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(recipe.read_text().replace("  last:\n", "  lost:\n"))
    capsys.readouterr()
    assert main(["train", str(renamed), "--resume"]) == 2
    assert "Task 'lost' is unknown to the adapter" in capsys.readouterr().err
