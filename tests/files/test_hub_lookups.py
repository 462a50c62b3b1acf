"""What lies on the Hub is checked before PEFT loads it, however the look-up goes. The Hub is a folder here."""

from __future__ import annotations

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file

from helpers import assert_unchanged, dense_config, fingerprint
from models import llama
from rank_experts import save_rank_experts
from rank_experts.files import peft as checked

REQUEST = httpx.Request("GET", "https://example.org/someone/adapter")


def answer(error, status):
    return error("no", response=httpx.Response(status, request=REQUEST))


FAILURES = {
    "503": lambda: answer(HfHubHTTPError, 503),
    "429": lambda: answer(HfHubHTTPError, 429),
    "gated": lambda: answer(GatedRepoError, 403),
    "timeout": lambda: httpx.ConnectTimeout("slow"),
    "unreachable, not cached": lambda: LocalEntryNotFoundError("cannot reach the Hub"),
    "disk full": lambda: OSError(28, "No space left on device"),
    "bug": lambda: RuntimeError("what"),
}
ABSENT = {
    "entry": lambda: answer(RemoteEntryNotFoundError, 404),
    "repository": lambda: answer(RepositoryNotFoundError, 404),
    "revision": lambda: answer(RevisionNotFoundError, 404),
}


class Hub:
    """A repository "someone/adapter"; our own look-ups of some files fail as told, PEFT's later ones do not."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.failing = {}
        monkeypatch.setattr(checked, "hf_hub_download", self.ours)
        monkeypatch.setattr("peft.config.hf_hub_download", self.download)
        monkeypatch.setattr(save_and_load, "hf_hub_download", self.download)
        monkeypatch.setattr(save_and_load, "file_exists", lambda repo_id, filename, **kw: (folder / filename).exists())
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def download(self, repo_id, filename, **kwargs):
        assert repo_id == "someone/adapter"
        if not (self.folder / filename).exists():
            raise ABSENT["entry"]()
        return str(self.folder / filename)

    def ours(self, repo_id, filename, **kwargs):
        if filename in self.failing:
            raise self.failing[filename]()
        return self.download(repo_id, filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    save_rank_experts(get_peft_model(llama(), dense_config()), tmp_path)
    return Hub(tmp_path, monkeypatch)


def damage(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)


def test_what_is_on_the_hub_is_checked_and_loaded(hub):
    PeftModel.from_pretrained(llama(), "someone/adapter")
    damage(hub.folder)
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(model, "someone/adapter")
    assert_unchanged(model, before)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", ["from_pretrained", "with a config", "load_adapter"])
def test_a_look_up_that_fails_lets_nothing_through_unchecked(hub, way, failure, file):
    damage(hub.folder)
    model = llama() if way != "load_adapter" else get_peft_model(llama(), dense_config(), adapter_name="first")
    before = fingerprint(model)
    hub.failing = {file: FAILURES[failure]}
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(model, "someone/adapter"),
        "with a config": lambda: PeftModel.from_pretrained(model, "someone/adapter", config=dense_config()),
        "load_adapter": lambda: model.load_adapter("someone/adapter", "second"),
    }[way]
    with pytest.raises(OSError, match=r"someone/adapter .*cannot be told.*the model is as it was"):
        load()
    assert_unchanged(model, before)


@pytest.mark.parametrize("absence", ABSENT)
def test_a_repository_without_a_config_is_pefts_to_report(hub, absence):
    (hub.folder / "adapter_config.json").unlink()
    hub.failing = {"adapter_config.json": ABSENT[absence]}
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(llama(), "someone/adapter")


def test_offline_what_is_not_in_the_cache_is_not_there(hub, monkeypatch):
    (hub.folder / "adapter_config.json").unlink()

    def offline():
        error = LocalEntryNotFoundError("not cached")
        error.__cause__ = OfflineModeIsEnabled("offline")
        return error

    hub.failing = {"adapter_config.json": offline}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(llama(), "someone/adapter")


@pytest.mark.parametrize("given", [False, True])
def test_a_config_that_is_given_does_not_spare_the_weights_the_check(hub, given):
    damage(hub.folder)
    (hub.folder / "adapter_config.json").unlink(missing_ok=given)
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(llama(), "someone/adapter", config=dense_config())


def test_a_pickle_is_not_read_where_a_config_is_given(hub):
    for file in list(hub.folder.iterdir()):
        file.unlink()
    torch.save({}, hub.folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        PeftModel.from_pretrained(llama(), "someone/adapter", config=dense_config())


def test_other_methods_adapters_are_looked_up_and_left_alone(hub):
    for file in list(hub.folder.iterdir()):
        file.unlink()
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(hub.folder)
    assert PeftModel.from_pretrained(llama(), "someone/adapter").peft_config["default"].peft_type == "LORA"
