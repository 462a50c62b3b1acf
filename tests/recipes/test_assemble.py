"""From a recipe to a model, and from an adapter's folder back to its model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

from helpers import dense_config
from models import llama
from rank_experts import inject_rank_experts, save_rank_experts
from rank_experts.layers import adapted_layers
from rank_experts.recipes.adapted import load_adapted
from rank_experts.recipes.assemble import adapter_config, load_base, load_tokenizer
from rank_experts.recipes.recipe import read_recipe
from rank_experts.recipes.yaml_lines import RecipeError
from recipe_files import save_model, write_recipe


def test_a_classifier_leaves_its_unused_pooler_out(tmp_path):
    file = write_recipe(tmp_path)
    for overrides, excluded in (
        ((), r"(.*\.)?pooler(\..*)?"),
        (("adapter.exclude_modules=[query]",), {"query"}),
    ):
        recipe = read_recipe(file, overrides)
        base = load_base(recipe)
        config = adapter_config(recipe, base)
        assert config.exclude_modules == excluded
        assert config.task_type == "FEATURE_EXTRACTION"
    inject_rank_experts(base, adapter_config(read_recipe(file), base))
    assert not any("pooler" in path for path, _ in adapted_layers(base))


def test_a_language_model_is_adapted_whole(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, "causal"))
    base = load_base(recipe, meta=True)
    base.pooler = base.lm_head
    config = adapter_config(recipe, base)
    assert config.exclude_modules is None
    assert config.task_type == "CAUSAL_LM"
    assert config.base_model_name_or_path == recipe.model.name


def test_a_tokenizer_pads_with_its_own_token_or_its_end_of_text(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, "causal"))
    assert load_tokenizer(recipe).pad_token == "[PAD]"
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(recipe.model.name)
    assert load_tokenizer(recipe).pad_token == "[EOS]"


@pytest.mark.parametrize("kind", ["classification", "causal", "seq2seq"])
def test_a_folder_without_a_tokenizer_is_named_with_its_line(kind, tmp_path):
    """For BERT and T5 transformers makes a tokenizer of special tokens alone, with which everything is unknown."""
    file = write_recipe(tmp_path, kind)
    recipe = read_recipe(file)
    for path in Path(recipe.model.name).glob("tokenizer*"):
        path.unlink()
    line = 1 + next(i for i, text in enumerate(file.read_text().splitlines()) if "name:" in text)
    with pytest.raises(
        RecipeError, match=rf"^{re.escape(str(file))}:{line}: model\.name: .*folder without a tokenizer"
    ):
        load_tokenizer(recipe)


def test_a_folder_without_a_model_is_named_with_its_line(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, "causal"), [f"model.name={tmp_path / 'elsewhere'}"])
    (tmp_path / "elsewhere").mkdir()
    for load in (load_tokenizer, load_base):
        with pytest.raises(RecipeError, match=r"^override 'model\.name=.*elsewhere': model\.name: "):
            load(recipe)


@pytest.fixture
def saved(tmp_path):
    """A LLaMA, and an adapter of it that names it."""
    base = save_model(tmp_path / "base", "causal")
    model = inject_rank_experts(llama(), dense_config())
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = str(base), "main"
    save_rank_experts(model, tmp_path / "adapter")
    return model, base, tmp_path / "adapter"


def test_an_adapter_without_a_task_type_takes_the_class_of_its_base(saved):
    _, _, adapter = saved
    assert type(load_adapted(adapter)) is transformers.LlamaForCausalLM


def test_a_base_that_moved_has_no_revision_of_the_old_one(saved, monkeypatch):
    _, base, adapter = saved
    seen = []
    whole = transformers.LlamaForCausalLM.from_pretrained

    def watch(name, **options):
        seen.append((name, options["revision"]))
        return whole(name, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", watch)
    load_adapted(adapter)
    moved = base.rename(base.parent / "moved")
    load_adapted(adapter, str(moved))
    assert seen == [(str(base), "main"), (str(moved), None)]


def test_an_adapter_that_does_not_name_its_base_asks_for_it(saved):
    model, base, adapter = saved
    model.peft_config["default"].base_model_name_or_path = None
    save_rank_experts(model, adapter)
    with pytest.raises(ValueError, match=r"does not name its base model\. Pass --base NAME"):
        load_adapted(adapter)
    load_adapted(adapter, str(base))
