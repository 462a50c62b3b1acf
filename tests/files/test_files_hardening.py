"""Files that lie, and saves that are cut off: what a folder can hold or meet, and what loading does about it."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from failing import each_fault
from helpers import CONFIGS, assert_unchanged, fingerprint, needs_trained_biases, token_config
from models import batch, bert, llama
from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, messages, save_rank_experts
from rank_experts.files import card, loading
from rank_experts.files.loading import restore_rank_experts
from rank_experts.layers import adapted_layers
from rank_experts.storage import pair, staging
from rank_experts.storage.pair import is_finite

CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
SMALL = dict(target_modules=["q_proj", "v_proj"])


def make(kind="token", seed=0, **kwargs):
    torch.manual_seed(seed)
    model = llama()
    torch.manual_seed(seed)
    return inject_rank_experts(model, CONFIGS[kind](**(SMALL | kwargs)))


def adapter(model):
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit_config(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_digest(folder):
    """Write the tensors as another program would."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})


def metadata(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()


def refused(folder, error, match, model=None):
    """Loading raises by our door and by PEFT's, and the model stays as it was."""
    for load in (load_rank_experts, PeftModel.from_pretrained):
        model = llama()
        before = fingerprint(model)
        with pytest.raises(error, match=match):
            load(model, folder)
        assert_unchanged(model, before)


# Which config belongs to the weights


def test_the_weights_carry_their_config_and_others_do_not_mind(tmp_path):
    model = make()
    save_rank_experts(model, tmp_path)
    assert metadata(tmp_path)["format"] == "pt"
    assert metadata(tmp_path)["rank_experts_config"] == (tmp_path / CONFIG).read_text()
    assert same(
        adapter(PeftModel.from_pretrained(llama(), tmp_path)),
        {f"base_model.model.{k}": v for k, v in adapter(model).items()},
    )


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        save_rank_experts(make(), tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("load", [load_rank_experts, PeftModel.from_pretrained], ids=["ours", "peft"])
def test_a_save_that_was_cut_off_between_the_files_counts(tmp_path, load):
    save_rank_experts(make(alpha=8), tmp_path)
    old = (tmp_path / CONFIG).read_bytes()
    save_rank_experts(make(alpha=32), tmp_path)
    (tmp_path / CONFIG).write_bytes(old)
    assert load(llama(), tmp_path).peft_config["default"].alpha == 32
    assert RankExpertConfig.from_pretrained(tmp_path).alpha == 32
    # A third adapter may be saved over the half-finished one.
    save_rank_experts(make(alpha=64), tmp_path)
    (tmp_path / CONFIG).write_bytes(old)
    assert load(llama(), tmp_path).peft_config["default"].alpha == 64


def test_an_edited_value_is_refused_and_an_edited_description_is_not(tmp_path):
    save_rank_experts(make(alpha=8), tmp_path)
    edit_config(tmp_path, base_model_name_or_path="somewhere/else", peft_version="0.0")
    assert load_rank_experts(llama(), tmp_path).peft_config["default"].base_model_name_or_path == "somewhere/else"
    edit_config(tmp_path, alpha=16)
    refused(tmp_path, ValueError, r"alpha=16, the weights beside it were saved with alpha=8")
    without_digest(tmp_path)
    assert load_rank_experts(llama(), tmp_path).peft_config["default"].alpha == 16


def test_a_pair_that_was_mixed_by_hand_is_refused(tmp_path):
    save_rank_experts(make(top_k=2), tmp_path / "first")
    save_rank_experts(make(top_k=4), tmp_path / "second")
    shutil.copy(tmp_path / "first" / CONFIG, tmp_path / "second" / CONFIG)
    refused(tmp_path / "second", ValueError, r"top_k=2, the weights beside it were saved with top_k=4")


def test_one_flipped_bit_of_a_tensor_is_damage(tmp_path):
    save_rank_experts(make(), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    refused(tmp_path, ValueError, "is damaged: its tensors are not those that were saved")


def test_a_header_that_swaps_two_tensors_is_damage(tmp_path):
    save_rank_experts(make(), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    first, second = [name for name in header if name.endswith("q_proj.rank_experts.A")]
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(tmp_path, ValueError, "is damaged: its tensors are not those that were saved")


def test_a_config_folder_without_weights_is_a_template(tmp_path):
    token_config(**SMALL).save_pretrained(tmp_path)
    assert RankExpertConfig.from_pretrained(tmp_path).top_k == 4
    assert PeftConfig.from_pretrained(tmp_path).top_k == 4
    get_peft_model(llama(), RankExpertConfig.from_pretrained(tmp_path))


# Nothing outside the folder, no code, no more memory than the file's size


def test_a_pickle_is_refused_by_name(tmp_path):
    save_rank_experts(make(), tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, FileNotFoundError, r"adapter_model.bin is a pickle")
    wrapped = get_peft_model(llama(), token_config(**SMALL))
    before = fingerprint(wrapped)
    for name in ("other", "default"):  # a new adapter; weights for the one that is there, as Trainer resumes
        with pytest.raises(FileNotFoundError, match="is a pickle"):
            wrapped.load_adapter(tmp_path, name)
        assert_unchanged(wrapped, before)


def test_no_line_of_the_library_reads_or_writes_a_pickle():
    for file in Path(staging.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "shelve"} & set(names), file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in ("torch.load", "torch.save", "np.load", "numpy.load"), file


def test_other_methods_are_left_alone(tmp_path):
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path, safe_serialization=False)
    assert same(adapter(PeftModel.from_pretrained(llama(), tmp_path)), adapter(lora))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    save_rank_experts(make(), tmp_path / "real")
    shutil.copytree(tmp_path / "real", tmp_path / "linked")
    (tmp_path / "linked" / name).unlink()
    (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    refused(tmp_path / "linked", ValueError, f"{name} is a link to .*outside of the folder")
    (tmp_path / "whole").symlink_to(tmp_path / "real")
    load_rank_experts(llama(), tmp_path / "whole")


def test_the_hubs_cache_is_read_through_its_links(tmp_path, monkeypatch):
    revision = "0" * 40
    repo = tmp_path / "models--user--adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / revision
    model = make()
    save_rank_experts(model, snapshot)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (snapshot / name).rename(repo / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    load_rank_experts(llama(), snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    PeftModel.from_pretrained(llama(), "user/adapter", cache_dir=tmp_path)
    (snapshot / WEIGHTS).rename(snapshot / "adapter_model.bin")
    base = llama()
    before = fingerprint(base)
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        PeftModel.from_pretrained(base, "user/adapter", cache_dir=tmp_path)
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path, name):
    save_rank_experts(make(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        load_rank_experts(llama(), tmp_path)


def test_saving_through_a_link_replaces_the_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "adapter" / name).symlink_to(tmp_path / "precious")
    save_rank_experts(make(), tmp_path / "adapter")
    assert (tmp_path / "precious").read_text() == "mine"
    load_rank_experts(llama(), tmp_path / "adapter")


LYING = {
    "r": dict(r=10**12),
    "r and experts": dict(r=10**12, expert_rank=10**6),
    "rank_pattern": dict(rank_pattern={"q_proj": 10**12}),
    "tasks": dict(tasks=[f"task {i}" for i in range(100_000)]),
    "embedding": dict(task_embedding_dim=10**12),
}


@pytest.mark.parametrize("case", LYING)
@pytest.mark.parametrize("load", [load_rank_experts, PeftModel.from_pretrained], ids=["ours", "peft"])
def test_a_config_that_claims_much_allocates_little(tmp_path, case, load):
    kind = "task" if case in ("tasks", "embedding") else "token"
    save_rank_experts(make(kind), tmp_path)
    without_digest(tmp_path)
    edit_config(tmp_path, **LYING[case])
    model = llama()
    before = fingerprint(model)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"has shape|lacks"):
        load(model, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
    assert_unchanged(model, before)


def test_a_config_of_gigabytes_is_not_read(tmp_path):
    save_rank_experts(make(), tmp_path)
    with open(tmp_path / CONFIG, "ab") as file:
        file.truncate(2**40)
    refused(tmp_path, ValueError, r"has 1099511627776 bytes: expected at most")


@pytest.mark.parametrize("size", [2**63, 10**8 + 1, 4096])
def test_a_header_longer_than_its_file_is_refused(tmp_path, size):
    save_rank_experts(make(), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(size.to_bytes(8, "little") + b"{}")
    refused(tmp_path, ValueError, f"header claims {size} bytes, the file has 10")


def rewrite_header(folder, change, grow_to=None):
    """Change the header's entries, and let the file have so many bytes, which take no room on the disk."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    change(entries)
    header = json.dumps(entries).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    if grow_to is not None:
        os.truncate(folder / WEIGHTS, 8 + len(header) + grow_to)


def restore(model, folder):
    inject_rank_experts(model, token_config(**SMALL))
    restore_rank_experts(model, folder)


@pytest.mark.parametrize("load", [load_rank_experts, PeftModel.from_pretrained, restore])
def test_shapes_are_compared_before_the_weights_are_read(tmp_path, load):
    """A file of 40 GiB of zeros takes no room on the disk; reading it would take all of the memory."""
    save_rank_experts(make(), tmp_path)

    def enlarge(entries):
        entries.pop("__metadata__")
        last = max((name for name in entries if name.endswith("A")), key=lambda name: entries[name]["data_offsets"])
        begin, end = entries[last]["data_offsets"]
        grown = 40 * 2**30
        entries[last] |= {"shape": [2**20, grown // 2**22], "data_offsets": [begin, begin + grown]}
        for name, entry in entries.items():
            if name != last and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [place + begin + grown - end for place in entry["data_offsets"]]
        enlarge.size = max(entry["data_offsets"][1] for entry in entries.values())

    rewrite_header(tmp_path, enlarge)
    with open(tmp_path / WEIGHTS, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    os.truncate(tmp_path / WEIGHTS, 8 + header + enlarge.size)
    model = llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"\.A has shape \(1048576, 10240\), expected \(16, 32\)"):
        load(model, tmp_path)
    if load is not restore:
        assert_unchanged(model, before)


BAD_PLACES = {
    "more bytes than tensors": (lambda entries, name: None, 2**34, "claims .* bytes of tensors, the file has"),
    "a gap": (lambda entries, name: entries.pop(name), None, "claims .* bytes of tensors, the file has"),
    "beyond the end": (lambda e, name: e[name].update(data_offsets=[0, 2**40]), None, "the bytes 0 to 1099511627776"),
    "backwards": (lambda e, name: e[name].update(data_offsets=[8, 4]), None, "the bytes 8 to 4"),
    "many bytes for few numbers": (lambda e, name: e[name].update(shape=[1]), None, r"of shape \(1,\), the bytes"),
    "negative": (lambda e, name: e[name].update(shape=[-1, -1]), None, "does not say where"),
    "no number": (lambda e, name: e[name].update(shape=["a"]), None, "does not say where"),
    "true": (lambda e, name: e[name].update(shape=[True]), None, "does not say where"),
    "no place": (lambda e, name: e[name].pop("data_offsets"), None, "does not say where"),
    "no entry": (lambda e, name: e.update({name: 7}), None, "does not say where"),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_a_header_says_where_every_tensor_lies_and_nothing_else_is_there(tmp_path, case):
    change, grow_to, message = BAD_PLACES[case]
    save_rank_experts(make(), tmp_path)
    without_digest(tmp_path)
    rewrite_header(tmp_path, lambda entries: change(entries, max(n for n in entries if n.endswith("A"))), grow_to)
    refused(tmp_path, ValueError, f"is damaged: its header .*{message}")


def test_a_file_that_does_not_fit_into_memory_is_said_to_be_too_large(tmp_path, monkeypatch):
    save_rank_experts(make(), tmp_path)

    size = (tmp_path / WEIGHTS).stat().st_size

    class Full(io.FileIO):
        def read(self, number=-1):
            if number == size:
                raise MemoryError
            return super().read(number)

    monkeypatch.setattr(pair.os, "fdopen", Full)
    with pytest.raises(ValueError, match=f"{WEIGHTS} has {size} bytes, which do not fit into memory"):
        load_rank_experts(llama(), tmp_path)


def test_a_save_between_the_header_and_the_weights_is_read_as_a_whole(tmp_path, monkeypatch):
    """The header was the first adapter's; the weights are the second's, and so is what is loaded."""
    first, second = (make(**kwargs) for kwargs in ADAPTERS)
    save_rank_experts(first, tmp_path)
    find, saved = loading.find_targets, []

    def save_meanwhile(*args):
        if not saved:
            saved.append(save_rank_experts(second, tmp_path))
        return find(*args)

    monkeypatch.setattr(loading, "find_targets", save_meanwhile)
    loaded = load_rank_experts(llama(), tmp_path)
    assert same(adapter(loaded), adapter(second))
    assert loaded.peft_config["default"].alpha == ADAPTERS[1]["alpha"]
    # Of the same shapes, where no check of these would tell.
    second, saved = make(seed=3, alpha=64, r=8, top_k=2), []
    loaded = load_rank_experts(llama(), tmp_path)
    assert same(adapter(loaded), adapter(second))
    assert loaded.peft_config["default"].alpha == 64


def test_a_config_that_comes_from_the_weights_is_said_and_bounded(tmp_path, monkeypatch):
    save_rank_experts(make(alpha=8), tmp_path)
    old = (tmp_path / CONFIG).read_bytes()
    save_rank_experts(make(alpha=32), tmp_path)
    (tmp_path / CONFIG).write_bytes(old)
    messages.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"{CONFIG} is older than {WEIGHTS} beside it: a save was cut off"):
        load_rank_experts(llama(), tmp_path)
    monkeypatch.setattr(pair, "MAX_CONFIG_BYTES", len(old))  # "32" takes a byte more than "8"
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged: the config within it has {len(old) + 1} bytes"):
        load_rank_experts(llama(), tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_json_that_is_nested_without_end_is_refused(tmp_path, name):
    save_rank_experts(make(), tmp_path)
    deep = b"[" * 200_000
    (tmp_path / name).write_bytes(deep if name == CONFIG else len(deep).to_bytes(8, "little") + deep)
    refused(tmp_path, ValueError, "not JSON")


# The config's values


WRONG_VALUES = {
    "expression": (dict(target_modules="(q_proj"), "target_modules: .*not a regular expression"),
    "pattern": (dict(rank_pattern={"*": 4}), "rank_pattern: .*not a regular expression"),
    "targets": (dict(target_modules=7), "target_modules=7: expected a list"),
    "a target": (dict(target_modules=["q_proj", 7]), "expected names, found 7"),
    "rank of a pattern": (dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\]=0: expected at least 1"),
    "alpha of a pattern": (dict(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\['q_proj'\]='x': expected a number"),
    "layers": (dict(layers_to_transform=[-1]), "expected numbers of layers, found -1"),
    "modules_to_save": (dict(modules_to_save="lm_head"), "modules_to_save='lm_head': expected a list"),
    "base model": (dict(base_model_name_or_path=[1]), "base_model_name_or_path=.*expected text"),
    "auto_mapping": (dict(auto_mapping=["os"]), "auto_mapping=.*expected a dict of text"),
    "inference_mode": (dict(inference_mode="yes"), "inference_mode='yes': expected True or False"),
    "old version": (dict(format_version=0), "format_version=0"),
    "true version": (dict(format_version=True), "format_version True"),
    "huge alpha": (dict(alpha=10**400), "alpha=1000.*expected a number from 0"),
    "NaN": (dict(alpha=float("nan")), "alpha=nan: expected a number from 0"),
    "infinite in float32": (dict(alpha=3.5e38), "alpha=3.5e.38: expected a number from 0"),
    "infinite by pattern": (dict(alpha_pattern={"q_proj": 1e39}), "q_proj.*=1e.39: expected a number from 0"),
    "endless": (dict(target_modules="(.*)*x"), "target_modules: .* may match a name in so many ways"),
    "many patterns": (dict(rank_pattern={f"q{i}": 4 for i in range(10_001)}), "rank_pattern has 10,001 entries"),
    "task_type": (dict(task_type="NONSENSE"), "Invalid task type"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_every_value_is_checked_by_both_doors(tmp_path, case):
    changes, message = WRONG_VALUES[case]
    save_rank_experts(make(), tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, ValueError, message)


@pytest.mark.parametrize("field", ["format_version", "top_kk"])
def test_peft_does_not_drop_what_it_does_not_know(tmp_path, field):
    save_rank_experts(make(), tmp_path)
    edit_config(tmp_path, **{field: 2})
    refused(
        tmp_path,
        ValueError,
        "format_version 2.*Upgrade" if field == "format_version" else r"unknown fields \['top_kk'\]",
    )


def test_two_hundred_thousand_tasks_are_checked_in_time():
    names = [f"task {i}" for i in range(200_000)]
    assert RankExpertConfig.more(tasks=names, target_modules=["q_proj"]).tasks == names


# Tensors by PEFT's door


def retype(dtype):
    return lambda tensors, name: tensors.update({name: torch.zeros(16, 32).to(dtype)})


WRONG_TENSORS = {
    "missing": (lambda t, name: t.pop(name), "lacks"),
    "unknown": (lambda t, name: t.update({name.replace(".A", ".C"): torch.zeros(2)}), "rank_experts.C"),
    "misshapen": (lambda t, name: t.update({name: torch.zeros(32, 16)}), r"shape \(32, 16\), expected \(16, 32\)"),
    "integers": (retype(torch.int32), "is torch.int32: expected a floating"),
    "eight bits": (retype(torch.float8_e4m3fn), "is torch.float8_e4m3fn: expected a floating"),
    "complex": (retype(torch.complex64), "is torch.complex64: expected a floating"),
    "NaN": (lambda t, name: t[name].view(-1)[3:4].fill_(float("nan")), "not finite"),
}


def first_A(tensors):
    return next(name for name in tensors if name.endswith("q_proj.rank_experts.A"))


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_both_doors(tmp_path, case):
    damage, message = WRONG_TENSORS[case]
    save_rank_experts(make(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors, first_A(tensors))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    refused(tmp_path, ValueError, message)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_state_dicts_are_refused(case, wrapped):
    damage, message = WRONG_TENSORS[case]
    model = get_peft_model(llama(), token_config(**SMALL)) if wrapped else make()
    tensors = {name: tensor.clone() for name, tensor in adapter(model).items()}
    set_peft_model_state_dict(model, tensors)
    for tensor in tensors.values():
        tensor += 1
    damage(tensors, first_A(tensors))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert_unchanged(model, before)


def test_a_bias_below_float32_is_refused(tmp_path):
    save_rank_experts(make(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("balance_bias"))
    save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / WEIGHTS)
    refused(tmp_path, ValueError, "balance_bias is torch.bfloat16: expected torch.float32")


def test_modules_to_save_keep_the_kind_of_their_numbers(tmp_path):
    config = token_config(target_modules=["query"], modules_to_save=["classifier"])
    save_rank_experts(inject_rank_experts(bert(), config), tmp_path)
    load_rank_experts(bert(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    save_file(tensors | {name: tensors[name].int()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"classifier.weight is torch.int32"):
        load_rank_experts(bert(), tmp_path)


@needs_trained_biases
def test_two_copies_of_a_bias_that_differ_are_refused(tmp_path):
    config = token_config(target_modules=["query"], modules_to_save=["classifier"], bias="all")
    save_rank_experts(inject_rank_experts(bert(), config), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.classifier.modules_to_save.bias"
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"two copies of one tensor and differ"):
        load_rank_experts(bert(), tmp_path)


def test_a_second_adapter_with_modules_to_save_is_loaded(tmp_path):
    config = token_config(target_modules=["query"], modules_to_save=["classifier"])
    save_rank_experts(inject_rank_experts(bert(), config), tmp_path)
    model = load_rank_experts(load_rank_experts(bert(), tmp_path), tmp_path, adapter_name="second").eval()
    expected = load_rank_experts(bert(), tmp_path).eval()(**batch("bert")).logits
    assert torch.equal(model(**batch("bert")).logits, expected)


# Saving: killed, crowded, out of room


def test_a_diverged_adapter_is_not_saved_over_a_good_one(tmp_path):
    save_rank_experts(make(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = make(seed=1)
    next(adapted_layers(model))[1].rank_experts["default"].A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"rank_experts.A of adapter 'default' has values that are not finite"):
        save_rank_experts(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def in_a_child(body, *args, **kwargs):
    """Run Python in a process of its own, with the tests' helpers at hand."""
    code = "from test_files_hardening import *\n" + body
    paths = [str(Path(__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)], env=env, capture_output=True, text=True, **kwargs
    )


LIMITED = """
import resource
folder, limits = Path(sys.argv[1]), [int(limit) for limit in sys.argv[2:]]
new = make(seed=1, top_k=2)
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_rank_experts(new, folder)
    except OSError as error:
        print(error.errno, error)
"""


def test_a_file_that_may_not_grow_keeps_the_old_adapter(tmp_path):
    save_rank_experts(make(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    result = in_a_child(LIMITED, tmp_path, 1, 3000, 20_000)
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stderr[-2000:]
    assert all(line.startswith(f"{errno.EFBIG} ") for line in lines)
    assert all("cannot save " in line and "unchanged" in line for line in lines)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_keeps_the_old_adapter_and_says_so(small_disk):
    model = make()
    save_rank_experts(model, small_disk)
    before = {file.name: file.read_bytes() for file in small_disk.iterdir()}
    with pytest.raises(
        OSError, match=r"No space left on device. What was there before is unchanged. [\d,]+ bytes are free"
    ) as raised:
        save_rank_experts(make(seed=1, r=64), small_disk)
    assert raised.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in small_disk.iterdir()} == before
    assert same(adapter(load_rank_experts(llama(), small_disk)), adapter(model))


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_changes(tmp_path):
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(OSError, match=f"{CONFIG} is a folder there"):
        save_rank_experts(make(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [CONFIG]


ADAPTERS = (dict(seed=1, alpha=8), dict(seed=2, alpha=32, r=8, top_k=2))

# One process that has imported everything, and children of it that save and are killed. Two adapters of different
# configs take turns in one folder; after each kill one of them is there, whole, by our door and by PEFT's.
KILLS = """
import random, signal, time
folder, kills, at_event = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "events"
torch.set_num_threads(1)
models = [make(**kwargs) for kwargs in ADAPTERS]
written = [adapter(model) for model in models]
random.seed(0)

def die_at(event):
    seen = [0]
    def hook(name, args):
        if name.startswith(("os.", "open", "fcntl", "shutil", "tempfile")):
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(first, event):
    if event:
        die_at(event)
        save_rank_experts(models[first], folder)
        os._exit(7)
    while True:
        for model in (models[first], models[1 - first]):
            save_rank_experts(model, folder)

def which(loaded):
    config, tensors = loaded.peft_config["default"], adapter(loaded)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    matches = [i for i, kwargs in enumerate(ADAPTERS)
               if config.alpha == kwargs["alpha"] and same(tensors, written[i])]
    assert len(matches) == 1, (config, sorted(os.listdir(folder)))
    return matches[0]

save_rank_experts(models[0], folder)
now, found, mixed, kill = 0, [0, 0], 0, 0
while kill < kills:
    kill += 1
    pid = os.fork()
    if not pid:
        try:
            child(1 - now, kill if at_event else 0)
        finally:
            os._exit(9)
    if not at_event:
        time.sleep(random.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7
    assert finished or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
    now = which(load_rank_experts(llama(), folder))
    found[now] += 1
    mixed += json.loads((folder / CONFIG).read_text())["alpha"] != ADAPTERS[now]["alpha"]
    if kill % 8 == 0 or at_event:
        assert which(PeftModel.from_pretrained(llama(), folder)) == now
    if finished:
        break
save_rank_experts(models[0], folder)
assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS], os.listdir(folder)
print(kill, *found, mixed)
"""


def test_a_kill_at_every_step_of_a_save_leaves_one_adapter(tmp_path):
    result = in_a_child(KILLS, tmp_path, 500, "events")
    assert result.returncode == 0, result.stderr[-3000:]
    steps, first, second, mixed = map(int, result.stdout.split())
    assert steps >= 15
    assert first >= 1
    assert second >= 1
    assert mixed >= 1  # killed between the two renames


@pytest.mark.filterwarnings("ignore:.*without locks", "ignore:The adapter is saved in")
def test_any_system_call_of_a_save_may_fail(tmp_path):
    """One adapter is there, whole; the new one where nothing was raised, the old one where that says unchanged."""
    first, second = (make(**kwargs) for kwargs in ADAPTERS)
    written = [adapter(first), adapter(second)]
    outcomes = []
    for fault in each_fault():
        save_rank_experts(first, tmp_path)
        said = None
        try:
            with fault:
                save_rank_experts(second, tmp_path)
        except OSError as raised:
            said = str(raised)
        loaded = load_rank_experts(llama(), tmp_path)
        now = [same(adapter(loaded), tensors) for tensors in written].index(True)
        assert loaded.peft_config["default"].alpha == ADAPTERS[now]["alpha"], fault.name
        assert now == (1 if said is None or "save once more" in said else 0), (fault.name, said)
        outcomes.append((now, said is None))
    assert fault.number > 40
    assert set(outcomes) == {(0, False), (1, False), (1, True)}


@pytest.mark.filterwarnings("ignore:The adapter is saved in")
def test_any_system_call_of_a_first_save_may_fail(tmp_path):
    """There is no folder, or all of it is there."""
    model = make()
    for fault in each_fault(errno.ENOSPC):
        with fault, contextlib.suppress(OSError):
            save_rank_experts(model, tmp_path / "adapter")
        if (tmp_path / "adapter").exists():
            assert same(adapter(load_rank_experts(llama(), tmp_path / "adapter")), adapter(model)), fault.name
            shutil.rmtree(tmp_path / "adapter")
    assert fault.number > 30


@pytest.mark.filterwarnings("ignore:Could not find a config file", "error:The adapter is saved in")
@pytest.mark.parametrize("name", ["n" * 300, "nul\0", "a\nb"])
def test_a_card_is_written_whatever_a_base_model_is_called(tmp_path, name):
    save_rank_experts(make(base_model_name_or_path=name), tmp_path)
    assert (tmp_path / CARD).is_file()


def test_a_card_that_cannot_be_made_only_warns(tmp_path, monkeypatch):
    messages.warn_once.cache_clear()
    monkeypatch.setattr(card, "_routing", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="The adapter is saved in .*, but its README.md could not be written"):
        save_rank_experts(make(), tmp_path)
    load_rank_experts(llama(), tmp_path)


NO_UNICODE = {
    "tasks": dict(kind="task", tasks=["cola", "mnli", "\ud800"]),
    "base_model_name_or_path": dict(base_model_name_or_path="\udcff"),
    "revision": dict(revision="a\udfff"),
    "target_modules": dict(target_modules=["q_proj", "\ud800"]),
    "rank_pattern": dict(rank_pattern={"\ud800": 4}),
    "auto_mapping": dict(auto_mapping={"base_model_class": "\ud800"}),
}


@pytest.mark.parametrize("field", NO_UNICODE)
def test_text_that_cannot_be_saved_is_refused_where_it_is_given(tmp_path, field):
    changes = dict(NO_UNICODE[field])
    kind = changes.pop("kind", "token")
    with pytest.raises(ValueError, match=f"{field}.*: .*is not Unicode text that can be saved: surrogates not allowed"):
        CONFIGS[kind](**(SMALL | changes))
    save_rank_experts(make(kind), tmp_path)
    without_digest(tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, ValueError, f"{field}.*: .*is not Unicode text")


@pytest.mark.parametrize("kills", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_kills_at_any_moment_leave_one_adapter(tmp_path, kills):
    result = in_a_child(KILLS, tmp_path, kills, "any")
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[0]) == kills


CROWD = """
import time
folder = Path(sys.argv[1])
torch.set_num_threads(1)
models = [make(**kwargs) for kwargs in ADAPTERS]
written = [adapter(model) for model in models]
save_rank_experts(models[0], folder)
children = []
for model in models * 2:
    if not (pid := os.fork()):
        try:
            for _ in range(25):
                save_rank_experts(model, folder)
            os._exit(7)
        finally:
            os._exit(9)
    children.append(pid)
loads = 0
while children:
    loaded = load_rank_experts(llama(), folder)
    config, tensors = loaded.peft_config["default"], adapter(loaded)
    pairs = zip(ADAPTERS, written)
    assert [config.alpha == kwargs["alpha"] and same(tensors, own) for kwargs, own in pairs].count(True) == 1
    loads += 1
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.WEXITSTATUS(status) == 7
            children.remove(pid)
assert sorted(os.listdir(folder)) == [CARD, CONFIG, WEIGHTS]
metadata_config = metadata(folder)["rank_experts_config"]
assert metadata_config == (folder / CONFIG).read_text()
print(loads)
"""


def test_processes_that_save_and_load_at_once_do_not_mix(tmp_path):
    result = in_a_child(CROWD, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) >= 5


def test_without_locks_saving_still_works_and_says_so_once(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(staging.fcntl, "flock", unsupported)
    (tmp_path / f".{WEIGHTS}.saving.other").write_text("another process is writing this")
    with pytest.warns(UserWarning, match="without locks"):
        save_rank_experts(make(), tmp_path)
    assert (tmp_path / f".{WEIGHTS}.saving.other").exists()
    load_rank_experts(llama(), tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # whose sum overflows
        ([1.0, float("nan")], False),
        ([float("inf"), float("-inf")], False),
        ([float("inf")], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_finite(values, expected, dtype):
    assert is_finite(torch.tensor(values, dtype=dtype)) == expected
