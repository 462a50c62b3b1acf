"""A tiny base model, rows with channels, and ms-swift's command lines on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rank_experts.integrations.swift import plugin_file

VOCAB = 64
TASKS = ["upper", "lower"]
SMORA = {"preset": "smora", "r": 16, "top_k": 4, "balance_rate": 0.01}
MORE = {"preset": "more", "tasks": TASKS, "r": 8}
BATCH = 2


def make_base(folder: Path) -> Path:
    """Write a base model with random weights and a tokenizer with a word a token."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    special = dict(unk_token="w3", pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the text alone
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int = 24, channels: list[str | None] | None = None) -> Path:
    """Write examples whose channels take turns; None leaves a row's out, no list leaves out all."""
    lines = []
    for i in range(count):
        prompt = " ".join(f"w{4 + (i * 7 + j * 5) % 56}" for j in range(3 + i % 4))
        channel = (channels or [None])[i % len(channels or [None])]
        answer = f"w{10 if channel == 'upper' else 40} w{5 + i % 9}"
        row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        lines.append(json.dumps(row if channel is None else row | {"channel": channel}))
    file.write_text("\n".join(lines) + "\n")
    return file


def swift(*args: object) -> subprocess.CompletedProcess[str]:
    """Run a command line of ms-swift's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "USE_HF": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(Path(sys.executable).with_name("swift")), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def passed(done: subprocess.CompletedProcess[str]) -> str:
    """Return all that a command said, which must have succeeded."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command ended with, which must have failed."""
    assert done.returncode != 0, done.stdout[-3000:]
    return done.stderr[-3000:]


def sft_arguments(base: Path, rows: Path, out: Path, settings: dict | None, **others: object) -> list[object]:
    """The arguments of a training; `others` replace or add options."""
    options: dict[str, object] = dict(
        model=base,
        model_type="llama",
        template="dummy",
        torch_dtype="float32",
        tuner_type="rank_experts",
        external_plugins=plugin_file(),
        dataset=rows,
        split_dataset_ratio=0,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate="1e-2",
        lr_scheduler_type="constant",
        output_dir=out,
        add_version="false",
        dataloader_num_workers=0,
        dataset_num_proc=1,
        report_to="none",
        check_model="false",  # against ModelScope's
        attn_impl="sdpa",
    )
    if settings is not None:
        options["model_kwargs"] = json.dumps({"rank_experts": settings})
    return [part for name, value in (options | others).items() for part in (f"--{name}", value)]


def sft(base: Path, rows: Path, out: Path, settings: dict | None, **others: object) -> Path:
    """Train, and return the last checkpoint's folder."""
    passed(swift("sft", *sft_arguments(base, rows, out, settings, **others)))
    return out / "checkpoint-6"


def logged(checkpoint: Path) -> list[dict[str, float]]:
    """Return what was logged up to a checkpoint, entry by entry."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def load_base(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
