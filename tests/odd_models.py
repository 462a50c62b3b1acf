"""Tiny models whose layers' rows are not examples in order: the sequence first, images, patches, windows."""

from __future__ import annotations

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerForSequenceClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

VOCAB = 64
IMAGE_TOKEN = 60


def xlnet():
    torch.manual_seed(0)
    return XLNetLMHeadModel(
        XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0, dropout=0.0)
    )


def fsmt():
    torch.manual_seed(0)
    return FSMTForConditionalGeneration(
        FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=VOCAB,
            tgt_vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.0,
            max_position_embeddings=64,
        )
    )


def longformer():
    torch.manual_seed(0)
    return LongformerForSequenceClassification(
        LongformerConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            attention_window=4,
            max_position_embeddings=64,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
    )


def led():
    torch.manual_seed(0)
    return LEDForConditionalGeneration(
        LEDConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
        )
    )


VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=4)


def llava():
    torch.manual_seed(0)
    text = dict(model_type="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    vision = dict(model_type="clip_vision_model", image_size=8, projection_dim=32) | VISION
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4)
    )


def clip():
    torch.manual_seed(0)
    text = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(max_position_embeddings=32, eos_token_id=2)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=dict(image_size=8) | VISION, projection_dim=16))


QWEN_TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
)
QWEN_VISION = dict(depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=1)
QWEN_TOKENS = dict(image_token_id=IMAGE_TOKEN, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)


def qwen2_vl():
    torch.manual_seed(0)
    vision = QWEN_VISION | dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_TOKENS))


def qwen2_5_vl():
    torch.manual_seed(0)
    vision = QWEN_VISION | dict(hidden_size=32, intermediate_size=48, out_hidden_size=32)
    vision |= dict(window_size=16, fullatt_block_indexes=[1])
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_TOKENS)
    )


def qwen3_vl():
    torch.manual_seed(0)
    vision = QWEN_VISION | dict(hidden_size=32, intermediate_size=48, out_hidden_size=32)
    vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=QWEN_TEXT | {"head_dim": 8}, vision_config=vision, **QWEN_TOKENS)
    )


def _swin(config, model):
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
    return model(config(**sizes, num_labels=3, drop_path_rate=0.0))


def swin():
    return _swin(SwinConfig, SwinForImageClassification)


def swinv2():
    return _swin(Swinv2Config, Swinv2ForImageClassification)
