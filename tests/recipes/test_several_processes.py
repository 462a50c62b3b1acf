"""The command line where several processes run it."""

from __future__ import annotations

import os

from transformers import TrainingArguments

from rank_experts.recipes.assemble import build_trainer
from rank_experts_cli import main
from recipe_files import write_recipe


def test_a_process_that_saves_nothing_copies_no_recipe_into_a_folder_that_may_not_be_there(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)

    def build(*args, **kwargs):
        trainer = build_trainer(*args, **kwargs)
        monkeypatch.setattr(TrainingArguments, "should_save", property(lambda self: False))
        return trainer

    monkeypatch.setattr("rank_experts.recipes.assemble.build_trainer", build)
    assert main(["train", str(recipe)]) == 0
    out = tmp_path / "out"
    assert not out.exists() or not {"recipe.yaml", "adapter_model.safetensors"} & set(os.listdir(out))
