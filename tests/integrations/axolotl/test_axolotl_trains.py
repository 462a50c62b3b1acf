"""axolotl's own command line trains an adapter on a tiny model, goes on, and what it saved loads everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.trainers

TASKS = ["upper", "lower"]
SMORA = {"preset": "smora", "r": 16, "top_k": 4}
MORE = {"preset": "more", "tasks": TASKS, "r": 4, "prompt": "completion"}
TYPES = {"smora": "completion", "more": "rank_experts.integrations.axolotl.tasks"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with a tokenizer, and rows of two tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("axolotl")
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **tokens)).save_pretrained(folder / "base")
    rows = []
    for i in range(40):
        letters = [chr(97 + (i * 7 + j * 3) % 26) for j in range(6)]
        task = TASKS[i % 2]
        said = [letter.upper() for letter in letters] if task == "upper" else letters
        rows.append({"text": " ".join([*letters, *said]), "task": task})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, block: dict, out: str, **changes) -> Path:
    """Write axolotl's YAML file, which JSON is too."""
    data = {"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": TYPES[block["preset"]], "field": "text"}
    values = {
        "base_model": str(folder / "base"),
        "plugins": ["rank_experts.integrations.axolotl.RankExpertsPlugin"],
        "adapter": "rank_experts",
        "rank_experts": block,
        "datasets": [data],
        "dataset_prepared_path": str(folder / f"prepared-{out}"),
        "output_dir": str(folder / out),
        "sequence_len": 64,
        "sample_packing": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "eager",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "special_tokens": {"pad_token": "<pad>"},
    }
    file = folder / f"{out}.yaml"
    file.write_text(json.dumps(values | changes))
    return file


def axolotl(command: str, file: Path, *arguments: str) -> subprocess.CompletedProcess:
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    program = str(Path(sys.executable).parent / "axolotl")
    return subprocess.run([program, command, str(file), *arguments], capture_output=True, text=True, env=environment)


def train(file: Path) -> None:
    done = axolotl("train", file, "--launcher", "python")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def logits(folder: Path, adapter: Path, how: str, **inputs) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rank_experts import load_rank_experts

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    load = load_rank_experts if how == "ours" else PeftModel.from_pretrained
    model = load(base, adapter).eval()
    with torch.no_grad():
        return model(torch.arange(4, 20).view(2, 8), **inputs).logits


@pytest.fixture(scope="module")
def trained(folder):
    """The folders of both adapters, each trained once."""
    for block in (SMORA, MORE):
        train(config(folder, block, block["preset"]))
    return folder


@pytest.mark.parametrize("preset", ["smora", "more"])
def test_the_adapter_is_trained_and_loads_here_and_in_peft(trained, preset):
    from safetensors.torch import load_file

    adapter = trained / preset
    inputs = {"task_ids": torch.tensor([0, 1])} if preset == "more" else {}
    ours, theirs = (logits(trained, adapter, how, **inputs) for how in ("ours", "peft"))
    assert torch.equal(ours, theirs)
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if name.endswith(".B") and tensor.any()]
    assert moved
    if preset == "smora":  # The callback has balanced.
        assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("balance_bias"))
    else:  # Tasks have reached the gate: each task's embedding has its own gradient.
        swapped = logits(trained, adapter, "ours", task_ids=torch.tensor([1, 0]))
        assert not torch.equal(ours, swapped)


def test_training_goes_on_where_it_stopped(trained):
    """Not bit by bit: axolotl does not repeat the order of the data, and a LoRA differs as much."""
    from safetensors.torch import load_file

    checkpoint = trained / "smora" / "checkpoint-3"
    train(config(trained, SMORA, "resumed", resume_from_checkpoint=str(checkpoint)))
    before, after = (
        json.loads((folder / "trainer_state.json").read_text())
        for folder in (checkpoint, trained / "resumed" / "checkpoint-6")
    )
    assert (before["global_step"], after["global_step"]) == (3, 6)
    assert after["log_history"][: len(before["log_history"])] == before["log_history"]
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, trained / "resumed"))
    moved = [float((last[name] - tensor).abs().max()) for name, tensor in first.items() if name.endswith(".B")]
    assert 0 < max(moved) < 0.06  # Three steps of Adam at a rate of 0.01 move a weight by about 0.03.


def test_going_on_from_an_adapter_that_computes_something_else_is_refused(trained):
    other = config(trained, MORE | {"tasks": TASKS[::-1]}, "other", lora_model_dir=str(trained / "more"))
    done = axolotl("train", other, "--launcher", "python")
    assert done.returncode != 0
    assert "was saved with tasks=['upper', 'lower']" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        (SMORA | {"topk": 3}, {}, "rank_experts.topk is no field of the preset 'smora'"),
        (MORE, {"sample_packing": True}, "sample_packing with a preset that routes by task"),
        (MORE | {"tasks": ["upper", "title"]}, {}, "task: 'lower', which is no task"),
    ],
)
def test_bad_settings_end_with_our_message(folder, block, changes, message):
    done = axolotl("train", config(folder, block, "refused", **changes), "--launcher", "python")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_merging(trained):
    """axolotl's command merges LoRAs alone, and says what to use; `rank-experts merge` takes a task."""
    done = axolotl("merge-lora", trained / "smora.yaml", "--lora-model-dir", str(trained / "smora"))
    assert done.returncode != 0
    assert "axolotl merge-lora merges LoRAs alone" in done.stdout + done.stderr
    out = trained / "merged"
    command = [str(Path(sys.executable).parent / "rank-experts"), "merge", str(trained / "more"), str(out)]
    subprocess.run([*command, "--task", "lower"], check=True)
    assert (out / "model.safetensors").is_file()
