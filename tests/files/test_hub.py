"""Pushing to the Hub through PEFT's path, with a Hub that keeps what it is given in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model
from transformers.utils import hub

from helpers import task_config, token_config
from models import batch, llama
from rank_experts import load_rank_experts, save_rank_experts
from rank_experts.files.card import CARD_FILE


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The folder that stands for the Hub's repository "someone/adapter"."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="someone/adapter")

    def create_commit(*args, operations, repo_id, **kwargs):
        assert repo_id == "someone/adapter"
        for operation in operations:
            shutil.copyfile(operation.path_or_fileobj, folder / operation.path_in_repo)

    def load(cls, repo_id, **kwargs):
        if not (folder / CARD_FILE).exists():
            raise EntryNotFoundError(f"{repo_id} has no {CARD_FILE}")
        return cls((folder / CARD_FILE).read_text())

    for name, fake in (("create_repo", create_repo), ("create_commit", create_commit)):
        monkeypatch.setattr(HfApi, name, lambda self, *args, fake=fake, **kwargs: fake(*args, **kwargs))
        monkeypatch.setattr(hub, name, fake, raising=False)  # where transformers has bound the methods by itself
    monkeypatch.setattr(ModelCard, "load", classmethod(load))
    return folder


@pytest.mark.parametrize("config", [token_config, task_config])
def test_push_to_hub_uploads_an_adapter_that_loads(repository, config):
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    model.push_to_hub("someone/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", CARD_FILE} <= {
        file.name for file in repository.iterdir()
    }
    inputs = batch("llama", labels=False) | ({"task_ids": "mnli"} if config is task_config else {})
    expected = model(**inputs).logits
    for again in (PeftModel.from_pretrained(llama(), repository), load_rank_experts(llama(), repository)):
        torch.testing.assert_close(again.eval()(**inputs).logits, expected)


def test_push_to_hub_keeps_the_card_that_is_there(repository, tmp_path):
    """Where the repository has a card, ours for instance, pushing leaves it; PEFT would write its template else."""
    model = get_peft_model(llama(), task_config(task_type="CAUSAL_LM"))
    save_rank_experts(model, tmp_path / "saved")
    card = (tmp_path / "saved" / CARD_FILE).read_text()
    shutil.copyfile(tmp_path / "saved" / CARD_FILE, repository / CARD_FILE)
    model.push_to_hub("someone/adapter")
    pushed = ModelCard((repository / CARD_FILE).read_text())
    assert pushed.text == ModelCard(card).text
    assert pushed.data.to_dict() == ModelCard(card).data.to_dict()
