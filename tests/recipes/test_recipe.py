"""The recipe's errors: what is wrong, in which line, and the nearest key."""

from __future__ import annotations

import re

import pytest

from rank_experts.recipes.recipe import RecipeError, read_recipe, template_columns
from recipe_files import CLASSIFICATION


def write(folder, old="", new="", method="more"):
    file = folder / "config.yaml"
    file.write_text(CLASSIFICATION.format(model="m", method=method, out="out").replace(old, new))
    return file


def test_a_good_recipe_is_read(tmp_path):
    recipe = read_recipe(write(tmp_path))
    assert list(recipe.tasks) == ["first", "last"]
    assert recipe.tasks["first"].labels == ["no", "yes"]
    assert recipe.training["learning_rate"] == 0.01
    config = recipe.adapter.config(list(recipe.tasks))
    assert (config.router, config.r, config.tasks, config.target_modules) == (
        "task",
        8,
        ["first", "last"],
        "all-linear",
    )
    assert recipe.tasks["last"].metrics("classification") == ["accuracy", "f1"]
    assert recipe.tasks["last"].templates("classification") == ["{sentence}", "{other}"]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("  max_length: 16", "  max_lenght: 16", 3, r"model.max_lenght: unknown key. The nearest is 'max_length'"),
        ("  max_length: 16", "  max_length: 1", 3, r"model.max_length: .*greater than or equal to 2.*Found 1"),
        ("  method: more", "  method: mor", 5, r"adapter.method: .*The nearest is 'more'"),
        ("  r: 8", "  rr: 8", 6, r"adapter.rr: unknown key"),
        ("  r: 8", "  r: 0", 6, r"adapter.r: r=0: expected at least 1"),
        ("  r: 8", "  tasks: [a]", 6, r"adapter.tasks: is set by the section tasks"),
        ("labels: [no, yes]", "lables: [no, yes]", 11, r"tasks.first.lables: unknown key. The nearest is 'labels'"),
        ("labels: [no, yes]", "prompt: x", 11, r"tasks.first.prompt: is for model.kind causal"),
        ("metric: [accuracy, f1]", "metric: acuracy", 16, r"unknown metric 'acuracy'.*The nearest is 'accuracy'"),
        ('text: "{{sentence}}"', "", 8, r"tasks.first: expected either text"),
        ("{sentence}", "{sentence.x}", 8, r"tasks.first: template .*is not a column's name"),
        ("max_steps: 4", "max_step: 4", 20, r"training.max_step: unknown key. The nearest is 'max_steps'"),
        ("training:\n  output_dir: out", "training:\n  seed: 1", 17, r"training: output_dir is missing"),
        (
            "columns: [sentence, other]",
            "columns:\n      - sentence\n      - [other]",
            17,
            r"tasks.last.columns.1: .*valid string",
        ),
        ("tasks:\n", "task:\n", 7, r"task: unknown key. The nearest is 'tasks'"),
        ("  r: 8", "  r: [8", 7, r"expected"),
        ("  r: 8", "  r: 8\n  r: 4", 7, r"duplicate key"),
    ],
)
def test_errors_name_the_line_and_the_nearest_key(tmp_path, old, new, line, message):
    old = old.replace("{{", "{").replace("}}", "}")
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(write(tmp_path, old, new))
    assert f"config.yaml:{line}: " in str(error.value)


def test_everything_wrong_is_said_at_once(tmp_path):
    file = write(tmp_path, "r: 8", "rr: 8")
    file.write_text(file.read_text().replace("max_steps", "max_step"))
    with pytest.raises(RecipeError) as error:
        read_recipe(file)
    assert len(str(error.value).splitlines()) == 2


def test_overrides_change_values_and_are_named_in_errors(tmp_path):
    file = write(tmp_path)
    recipe = read_recipe(file, ["training.learning_rate=3e-4", "tasks.first.limit=7", "data.sampling=uniform"])
    assert recipe.training["learning_rate"] == 3e-4
    assert recipe.tasks["first"].limit == 7
    assert recipe.data.sampling == "uniform"
    with pytest.raises(
        RecipeError, match=r"override 'adapter.top=4': adapter.top: unknown key. The nearest is 'top_k'"
    ):
        read_recipe(file, ["adapter.top=4"])
    with pytest.raises(RecipeError, match=r"expected key=value"):
        read_recipe(file, ["adapter.r"])
    with pytest.raises(RecipeError, match="'r' holds a value"):
        read_recipe(file, ["adapter.r.x=4"])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match=r"list.yaml:1: expected the sections model, adapter"):
        read_recipe(tmp_path / "list.yaml")


def test_text_models_need_prompt_and_target(tmp_path):
    with pytest.raises(RecipeError) as error:
        read_recipe(write(tmp_path, "max_length: 16", "kind: causal"))
    assert "tasks.first.prompt: is missing" in str(error.value)
    assert "tasks.first.text: is for model.kind classification" in str(error.value)
    assert "'f1' does not score text" in str(error.value)


def test_templates():
    assert template_columns("a {b} {{c}} {d}") == ["b", "d"]
    for bad in ("{a.b}", "{}", "{a!r}", "{a:3}", "{open"):
        with pytest.raises(ValueError, match=r"is not a column|expected"):
            template_columns(bad)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  max_steps: null", r"training.max_steps: expected a valid integer. Found None"),
        ("  max_steps: '4'", r"training.max_steps: expected a valid integer. Found '4'"),
        ("  gradient_accumulation_steps: 0", r"training.gradient_accumulation_steps: expected at least 1. Found 0"),
        ("  num_train_epochs: .inf", r"training.num_train_epochs: expected a number above 0. Found inf"),
        ("  router_learning_rate: -1", r"training.router_learning_rate: expected a number above 0. Found -1"),
    ],
)
def test_values_of_training_are_checked(tmp_path, line, message):
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(write(tmp_path, "  max_steps: 4", line))
    assert "config.yaml:20: " in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"model:\n  name: \xff\n", 2, "not UTF-8 text"),
        (
            b"model:\n  name: 2001-99-99\n",
            2,
            "'2001-99-99' cannot be read: month must be in 1..12. Put text into quotes",
        ),
        (b"model: &a\n  name: *a\n", 1, "contain themselves"),
        (b"[" * 20_000, 1, "nested too deeply"),
        (b"a: [" + b"[" * 30 + b"]" * 31, 1, "nested too deeply"),
        (b"a: &a [" + b"x," * 999 + b"x]\nb: [" + b"*a," * 30 + b"]", 1, "more than 20000 values"),
        (b"a: " + b"x" * 2**20, 1, "1048579 bytes are too many"),
        (b"a: 1\n---\nb: 2", 2, "but found another document"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_its_line(tmp_path, text, line, message):
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        read_recipe(file)
    assert str(error.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize("value", ["''", "[]", "['train.csv', '']"])
def test_a_split_without_a_name_is_refused(tmp_path, value):
    with pytest.raises(RecipeError, match=r"tasks\.last\.train: is empty: expected a split's name, or files"):
        read_recipe(write(tmp_path), [f"tasks.last.train={value}"])


@pytest.mark.parametrize("key", ["model.max_length", "tasks.last.limit", "training.epoch_size"])
def test_numbers_beyond_what_tokenizers_and_samplers_count_are_refused(tmp_path, key):
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        read_recipe(write(tmp_path), [f"{key}={10**300}"])
