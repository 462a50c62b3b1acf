"""Tiny models of transformers' architectures: a config of each with small numbers in the place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

# What a task's classes are called with, and for which architectures the task is taken: the first one that has it.
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
MOST_PARAMETERS = 20_000_000

_WIDTH, _HEADS, _VOCABULARY = 32, 4, 128
_NAMES = {
    _WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size d_embed emb_dim model_dim decoder_hidden_size "
    "encoder_hidden_size projection_dim text_embed_dim vision_embed_dim word_embed_proj_dim hidden_dim "
    "attention_hidden_size out_hidden_size image_size input_size",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim d_inner mlp_dim moe_intermediate_size "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size ffn_hidden_size ffn_hidden_dim "
    "decoder_ffn_size mlp_hidden_size block_ff_dim block_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers "
    "num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers num_key_value_heads "
    "decoder_num_key_value_heads encoder_num_key_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token",
    _HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts",
    8: "head_dim d_kv d_head kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank dt_rank "
    "time_step_rank patch_size ssm_state_size mamba_d_state state_size mamba_n_heads mamba_num_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    16: "attention_window_size sliding_window chunk_size attention_chunk_size num_mel_bins",
    _VOCABULARY: "vocab_size decoder_vocab_size encoder_vocab_size max_position_embeddings n_positions n_ctx "
    "max_source_positions",
}
_SMALL = {name: value for value, names in _NAMES.items() for name in names.split()}
_HEAD_SIZES, _LAYERS = _NAMES[8].split(), [name for name in _NAMES[2].split() if "layer" in name or name == "depth"]
# Nothing is dropped at random, and nothing masked: what gets no gradient gets none in any run.
_QUIET = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    dict.fromkeys(_HEAD_SIZES),  # Sizes that must fit others keep their own.
    dict.fromkeys(_LAYERS, 12),  # Hybrids have one layer of attention among several others.
    dict.fromkeys(_HEAD_SIZES) | dict.fromkeys(_LAYERS, 12),
    {"num_key_value_heads": _HEADS},  # As many as heads, where keys are made of a latent.
    dict.fromkeys(_HEAD_SIZES) | dict.fromkeys(_NAMES[_WIDTH].split(), 64 * _HEADS),  # Rotary sections of 64.
    {"image_size": None, "patch_size": None},
)
"""What differs in each way of shrinking: name to number, None: as it is; of an architecture the first counts whose
forward runs."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "unk_token_id": 3}


def architectures() -> dict[str, tuple[str, str]]:
    """Return model type to (task, class name): every architecture that has one of `TASKS`."""
    found: dict[str, tuple[str, str]] = {}
    for task, mapping in TASKS.items():
        for model_type, name in getattr(modeling_auto, mapping).items():
            found.setdefault(model_type, (task, name if isinstance(name, str) else name[0]))
    return dict(sorted(found.items()))


def tiny_config(model_type: str, variant: int = 0) -> PreTrainedConfig:
    """Return a config of an architecture with small numbers."""
    return _shrunk(configuration_auto.CONFIG_MAPPING[model_type], _SMALL | VARIANTS[variant])


def tiny_model(model_type: str, class_name: str, variant: int = 0) -> nn.Module:
    """Return a randomly initialised model of an architecture, in evaluation mode and float32.

    Raises:
        ValueError: It is still larger than `MOST_PARAMETERS`.
    """
    import transformers

    config = tiny_config(model_type, variant)
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, class_name)(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{model_type} has {size} parameters")
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config).float().eval()


def _shrunk(config_class: type[PreTrainedConfig], sizes: dict[str, int | None]) -> PreTrainedConfig:
    default = config_class()
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(type(value), sizes).to_dict()
        elif name in _TOKENS and isinstance(value, int):
            small[name] = _TOKENS[name]
        elif name in _QUIET:
            small[name] = _QUIET[name]
        elif (size := sizes.get(name)) is not None and type(value) is int and value > size:
            small[name] = size
        elif name in ("depths", "num_layers_per_stage") and isinstance(value, (list, tuple)):
            small[name] = [1] * len(value)
        elif name in ("num_heads", "num_attention_heads") and isinstance(value, (list, tuple)):
            small[name] = [2] * len(value)
        elif name.endswith("token_id") and isinstance(value, int) and value >= _VOCABULARY:
            small[name] = _VOCABULARY - 1 - len([key for key in small if key.endswith("token_id")])
    return config_class(**small)
