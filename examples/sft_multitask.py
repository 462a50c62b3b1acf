"""Fine-tune a decoder on several text-to-text tasks at once, with TRL's SFTTrainer.

    python examples/sft_multitask.py                                       # a tiny model, made here; minutes on a CPU
    python examples/sft_multitask.py --model Qwen/Qwen3-0.6B --method smora --steps 500

Each task is prompts and completions; a column `task_ids` says whose an example is. `RankExpertTrainerMixin` before
SFTTrainer draws batches by a sampling law and trains the auxiliary losses, which SFTTrainer's own loss leaves out.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rank_experts import RankExpertConfig, use_task
from rank_experts.training import RankExpertTrainerMixin

LETTERS = "abcdefghijkl"


class MultiTaskSFTTrainer(RankExpertTrainerMixin, SFTTrainer):
    """SFTTrainer on several tasks."""


def reverse(word: str) -> str:
    return word[::-1]


def sort(word: str) -> str:
    return "".join(sorted(word))


def shift(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word)


# The prompt does not say which task it is: without its task a model could only guess.
TASKS = {"reverse": reverse, "sort": sort, "shift": shift}


def examples(task: str, size: int, seed: int) -> Dataset:
    """Make prompts and completions of a task, with its id."""
    random.seed(f"{task} {seed}")
    words = ["".join(random.choices(LETTERS, k=4)) for _ in range(size)]
    return Dataset.from_dict(
        {
            "prompt": [f"{' '.join(word)} >" for word in words],
            "completion": [" " + " ".join(TASKS[task](word)) for word in words],
            "task_ids": [list(TASKS).index(task)] * size,
        }
    )


def tiny_model(folder: Path) -> str:
    """Make a model and a tokenizer that know the letters, so that the example needs no download."""
    words = ["[PAD]", "[EOS]", "[UNK]", ">", *LETTERS]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]", eos_token="[EOS]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def config_for(method: str) -> RankExpertConfig:
    """Return the adapter's config: MoRE knows the tasks by name, SMoRA finds its own way token by token."""
    # Scales and contrastive loss as docs/choose.md has them, not the papers'.
    if method == "more":
        measured = {"rank_scaling": "none", "contrastive_coef": 0.01}
        return RankExpertConfig.more(tasks=list(TASKS), r=16, alpha=32, **measured, target_modules="all-linear")
    return RankExpertConfig.smora(r=64, top_k=8, alpha=4, target_modules="all-linear")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub name or a folder; default: a tiny model made here")
    parser.add_argument("--method", choices=["more", "smora"], default="more")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="default: 5e-3 for the tiny model, 2e-4 for others")
    parser.add_argument("--examples", type=int, default=1000, help="training examples a task")
    parser.add_argument("--out", type=Path, default=Path("sft-output"))
    args = parser.parse_args(argv)

    name = args.model or tiny_model(args.out / "tiny-model")
    trainer = MultiTaskSFTTrainer(
        model=name,
        args=SFTConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate or (2e-4 if args.model else 5e-3),
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=max(1, args.steps // 10),
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 2),
            save_strategy="no",
            max_length=256,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=args.model is not None,
            report_to="none",
        ),
        train_dataset=concatenate_datasets([examples(task, args.examples, seed=0) for task in TASKS]),
        eval_dataset={task: examples(task, 64, seed=1) for task in TASKS},
        peft_config=config_for(args.method),
        sampling="balanced",
    )
    trainer.train()
    trainer.save_model(str(args.out / "adapter"))

    model = AutoPeftModelForCausalLM.from_pretrained(args.out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    for task in TASKS:
        row = examples(task, 1, seed=2)[0]
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        if args.method == "more":
            with use_task(model, task):
                written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        else:
            written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{task:8} {row['prompt']} {answer.strip()}   (expected: {row['completion'].strip()})")


if __name__ == "__main__":
    main()
