"""More models for the catalogue: architectures that no rule was written for, and models outside transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.own import Classifier, Recommender, Translator, UNet
from benchmarks.sizes_and_batches import (
    CONVNEXT,
    DECODER,
    ENCODER,
    FORECAST,
    GPT,
    GROUPED,
    LENGTH,
    NO_DROP,
    ROWS,
    S2S,
    VOCABULARY,
    Made,
    classes,
    hf,
    ids,
    images,
    large_pixels,
    masked,
    own,
    pixels,
    seeded,
    series,
    unmasked,
    without,
)


def _boxes() -> dict[str, Any]:
    corners = torch.randint(0, 30, (ROWS, LENGTH, 2), generator=seeded())
    return {**masked(), "bbox": torch.cat([corners, corners + 10], dim=-1)}


def _text_classes() -> dict[str, Any]:
    return {"input_ids": ids(), "labels": classes()}


def _image_and_text() -> dict[str, Any]:
    answers = torch.rand(ROWS, 10, generator=seeded())
    return {"input_ids": ids(), "pixel_values": images(), "pixel_mask": torch.ones(ROWS, 32, 32, dtype=torch.long)} | {
        "labels": answers
    }


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 32, 8, generator=seeded()), "labels": ids()}


def _windows() -> dict[str, Any]:
    g = seeded()
    return {"past_values": torch.randn(ROWS, 32, 3, generator=g), "future_values": torch.randn(ROWS, 8, 3, generator=g)}


def _noised() -> dict[str, Any]:
    times = torch.rand(ROWS, 1, generator=seeded())
    return {"images": images(16), "times": times, "noise": torch.randn(ROWS, 3, 16, 16, generator=seeded())}


def _clicks() -> dict[str, Any]:
    g = seeded()
    kinds = torch.stack([torch.randint(31, (ROWS,), generator=g), torch.randint(7, (ROWS,), generator=g)], dim=1)
    bags = torch.randint(50, (ROWS, 4), generator=g)
    return {"numbers": torch.randn(ROWS, 5, generator=g), "bags": bags, "kinds": kinds} | {
        "clicked": torch.randint(2, (ROWS,), generator=g).float()
    }


def _sentences() -> dict[str, Any]:
    labels = ids(seed=1)
    labels[0, 4:] = -100
    return {"input_ids": ids(length=9), "decoder_input_ids": ids(seed=1), "labels": labels}


FURTHER: dict[str, Callable[[], Made]] = {
    "unet": own(UNet, _noised),
    "dlrm": own(Recommender, _clicks),
    "lstm": own(Translator, _sentences),
    "convnet": own(Classifier, pixels),
    "roformer": hf("RoFormerForMaskedLM", "RoFormerConfig", masked, **ENCODER),
    "ernie": hf("ErnieForMaskedLM", "ErnieConfig", masked, **ENCODER),
    "layoutlm": hf(
        "LayoutLMForTokenClassification",
        "LayoutLMConfig",
        _boxes,
        **ENCODER,
        max_2d_position_embeddings=64,
        num_labels=96,
    ),
    "nystromformer": hf(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        unmasked,
        **ENCODER,
        num_landmarks=4,
        segment_means_seq_len=12,
        conv_kernel_size=3,
    ),
    "perceiver": hf(
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        _text_classes,
        vocab_size=VOCABULARY,
        num_latents=6,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        max_position_embeddings=LENGTH,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    ),
    "poolformer": hf(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        pixels,
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=10,
    ),
    "levit": hf(
        "LevitForImageClassification",
        "LevitConfig",
        large_pixels,
        image_size=64,
        hidden_sizes=[16, 32, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        attention_ratio=[2, 2, 2],
        drop_path_rate=0,
        num_labels=10,
    ),
    "vilt": hf(
        "ViltForQuestionAnswering",
        "ViltConfig",
        _image_and_text,
        **ENCODER,
        image_size=32,
        patch_size=8,
        num_labels=10,
        max_image_length=16,
    ),
    "speech_to_text": hf(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        _speech,
        **without(S2S, "max_position_embeddings"),
        input_feat_per_channel=8,
        conv_channels=16,
        num_conv_layers=2,
        conv_kernel_sizes=[3, 3],
        max_source_positions=32,
        max_target_positions=32,
    ),
    "time_series": hf(
        "TimeSeriesTransformerForPrediction",
        "TimeSeriesTransformerConfig",
        series,
        **{**FORECAST, "encoder_layers": 1},
    ),
    "patchtst": hf(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        _windows,
        num_input_channels=3,
        context_length=32,
        prediction_length=8,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        attention_dropout=0.0,
        ff_dropout=0.0,
        path_dropout=0.0,
        head_dropout=0.0,
        positional_dropout=0.0,
        loss="mse",
    ),
    "rwkv": hf(
        "RwkvForCausalLM",
        "RwkvConfig",
        unmasked,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        context_length=64,
    ),
    "jamba": hf(
        "JambaForCausalLM",
        "JambaConfig",
        masked,
        **GROUPED,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "fnet": hf(
        "FNetForMaskedLM",
        "FNetConfig",
        unmasked,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
        max_position_embeddings=64,
    ),
    "mobilevit": hf(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        pixels,
        image_size=64,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
        num_attention_heads=2,
        num_labels=10,
        classifier_dropout_prob=0.0,
        **NO_DROP,
    ),
    "modernbert": hf(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        masked,
        **DECODER,
        local_attention=4,
    ),
    "gpt_bigcode": hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", masked, **GPT),
    "granite": hf("GraniteForCausalLM", "GraniteConfig", masked, **GROUPED),
    "ctrl": hf("CTRLLMHeadModel", "CTRLConfig", masked, **without(GPT, "attn_pdrop"), dff=64),
    "mpnet": hf("MPNetForMaskedLM", "MPNetConfig", masked, **ENCODER),
    "squeezebert": hf("SqueezeBertForMaskedLM", "SqueezeBertConfig", masked, **ENCODER, embedding_size=32),
    "convnextv2": hf("ConvNextV2ForImageClassification", "ConvNextV2Config", pixels, **CONVNEXT),
}
