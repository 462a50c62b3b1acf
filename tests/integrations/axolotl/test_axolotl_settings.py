"""What the block `rank_experts:` may say, and what is refused before axolotl loads anything. Needs no axolotl."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rank_experts.integrations.axolotl.settings import TASKS_TYPE, check, read_settings, task_id

MORE = {"preset": "more", "tasks": ["cola", "rte"]}


def config(block=None, **changes):
    return {"adapter": "rank_experts", "rank_experts": {"preset": "smora"} if block is None else block} | changes


def test_the_block_is_a_preset_and_its_fields():
    found = read_settings({"preset": "smora", "r": 16, "top_k": 4, "target_modules": ["q_proj"]}).config()
    assert (found.router, found.r, found.top_k, found.target_modules) == ("token", 16, 4, {"q_proj"})
    assert read_settings({"preset": "lora"}).config().target_modules == "all-linear"
    found = read_settings(MORE | {"task_column": "kind", "prompt": "alpaca"})
    assert (found.tasks, found.task_column, found.prompt) == (["cola", "rte"], "kind", "alpaca")
    assert found.config().tasks == ["cola", "rte"]
    assert found.config().task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, r"rank_experts: found None, expected a block with a preset"),
        ({}, r"rank_experts\.preset is missing: expected one of smora, more"),
        ({"preset": "smroa"}, r"rank_experts\.preset is 'smroa'.*nearest is 'smora'"),
        ({"preset": "smora", "topk": 4}, r"rank_experts\.topk is no field of the preset 'smora'.*nearest is 'top_k'"),
        ({"preset": "smora", "router": "task"}, r"rank_experts\.router is no field"),
        ({"preset": "smora", "top_k": 100}, r"rank_experts: .*top_k"),
        ({"preset": "more"}, r"rank_experts\.tasks is missing"),
        (MORE | {"task_column": 3}, r"rank_experts\.task_column is 3: expected a name"),
    ],
)
def test_a_bad_block_is_refused_by_its_key(block, message):
    with pytest.raises(ValueError, match=message):
        read_settings(block)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "lora", "rank_experts": {"preset": "smora"}}, r"a block beside adapter: lora"),
        (config(lora_r=8), r"lora_r has no effect on rank experts"),
        (config(lora_mlp_kernel=True), r"lora_mlp_kernel has no effect"),
        (config(merge_lora=True), r"axolotl merge-lora merges LoRAs alone.*rank-experts merge"),
        (config(rl="dpo"), r"rl: dpo with adapter: rank_experts: not supported"),
        (config(MORE, sample_packing=True), r"sample_packing with a preset that routes by task"),
        (config(MORE, datasets=[{"path": "a", "type": "alpaca"}]), r"type: alpaca, which drops the column 'task'"),
        (config(MORE, test_datasets=[{"path": "a"}]), r"test_datasets: a has type: None"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check(values)


def test_what_fits_passes():
    check({"adapter": "lora", "lora_r": 8})
    check(config(sample_packing=True))  # A token router sees tokens.
    check(config(MORE, datasets=[{"path": "a", "type": TASKS_TYPE}]))
    check(config(MORE | {"tasks": ["only"]}, datasets=[{"path": "a", "type": "alpaca"}]))


def test_a_row_names_its_task():
    settings = read_settings(MORE | {"task_column": "kind"})
    assert [task_id({"kind": name}, settings) for name in ("rte", "cola")] == [1, 0]
    with pytest.raises(ValueError, match=r"columns \['text'\] and no 'kind'.*'cola', 'rte'"):
        task_id({"text": "a"}, settings)
    with pytest.raises(ValueError, match=r"kind: 'rt', which is no task.*nearest is 'rte'"):
        task_id({"kind": "rt"}, settings)


def test_nothing_of_axolotl_is_imported_before_axolotl_asks():
    code = "import sys, rank_experts.integrations.axolotl.settings; assert 'axolotl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
