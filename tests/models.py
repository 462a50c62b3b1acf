"""Tiny models of real architectures, made from configs, with random weights."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


def llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | kwargs)))


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, pad_token_id=0))


def bert(num_labels: int = 3, **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=num_labels, **(sizes | kwargs)))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        )
    )


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


class CheckpointedBlock(nn.Module):
    """A layer that checkpoints its activations by hand."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.proj, x, use_reentrant=self.use_reentrant)


MODELS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit, "mixtral": mixtral}

# What a user would adapt; Mixtral's experts are 3-D parameters, its attention is linear.
TARGETS = dict.fromkeys(MODELS, "all-linear") | {"mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"]}

CAUSAL = ("llama", "qwen3", "gpt2", "mixtral")


def batch(name: str, size: int = 4, length: int = 7, labels: bool = True) -> dict[str, torch.Tensor]:
    """Inputs for a tiny model; text comes with padding on the right of every second example."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
    else:
        ids = torch.randint(1, VOCAB, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, -2:] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if labels and name in ("bert", "vit"):
        inputs["labels"] = torch.arange(size) % 3
    elif labels and name == "t5":
        inputs["labels"] = torch.randint(1, VOCAB, (size, 5), generator=generator)
    elif labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs
