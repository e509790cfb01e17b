"""Models of pairs of images and text, of video and of sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sizes_and_batches import (
    DECODER,
    ENCODER,
    GPT,
    GROUPED,
    LENGTH,
    ROWS,
    S2S,
    VISION_SIZES,
    Made,
    classes,
    hf,
    ids,
    images,
    seeded,
    spectra,
    without,
)


def _videos() -> dict[str, Any]:
    return {"pixel_values": torch.randn(ROWS, 4, 3, 32, 32, generator=seeded()), "labels": classes()}


def _pairs() -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": images()} | {
        "return_loss": True
    }


def _captions() -> dict[str, Any]:
    return {"input_ids": ids(), "pixel_values": images(), "labels": ids()}


def _written() -> dict[str, Any]:
    return {"pixel_values": images(), "labels": ids(seed=1)}


def _spectrograms() -> dict[str, Any]:
    return {"input_values": torch.randn(ROWS, 32, 16, generator=seeded()), "labels": classes()}


def _sound_classes() -> dict[str, Any]:
    return spectra(classes())


def _pictures() -> dict[str, Any]:
    tokens = torch.randint(0, 96, (ROWS, 16), generator=seeded())
    return {"input_ids": tokens, "labels": tokens}


def _regions() -> dict[str, Any]:
    g = seeded()
    return {"input_ids": ids(), "visual_feats": torch.randn(ROWS, 5, 16, generator=g)} | {
        "visual_pos": torch.rand(ROWS, 5, 4, generator=g),
        "labels": torch.randint(10, (ROWS,), generator=g),
    }


def _visual_text() -> dict[str, Any]:
    tokens = torch.full((ROWS, LENGTH), 5)
    tokens[:, 0] = 1
    text = ids(LENGTH, 0).clamp(max=94)
    text[:, 1:5] = 95
    labels = text.masked_fill(text == 95, -100)
    return {"input_ids": text, "pixel_values": images(), "labels": labels, "attention_mask": torch.ones_like(tokens)}


def _captioner() -> Made:
    import transformers

    torch.manual_seed(0)
    encoder = transformers.ViTConfig(**VISION_SIZES)
    decoder = transformers.GPT2Config(**GPT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=0
    )
    return transformers.VisionEncoderDecoderModel(config=config), _written()


_CLIP_TEXT = {**DECODER, "eos_token_id": 95, "attention_dropout": 0.0}

_CLIP_VISION = without(VISION_SIZES, "num_labels")

_PAIR = {"projection_dim": 16, "text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION}

_DEC = without(VISION_SIZES, "num_labels", "image_size", "patch_size")


MULTIMODAL: dict[str, Callable[[], Made]] = {
    "clip": hf("CLIPModel", "CLIPConfig", _pairs, **_PAIR),
    "videomae": hf(
        "VideoMAEForVideoClassification", "VideoMAEConfig", _videos, **VISION_SIZES, num_frames=4, tubelet_size=2
    ),
    "timesformer": hf(
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        _videos,
        **VISION_SIZES,
        num_frames=4,
        drop_path_rate=0,
    ),
    "vivit": hf(
        "VivitForVideoClassification",
        "VivitConfig",
        _videos,
        **without(VISION_SIZES, "patch_size"),
        num_frames=4,
        tubelet_size=[2, 8, 8],
    ),
    "imagegpt": hf(
        "ImageGPTForCausalImageModeling",
        "ImageGPTConfig",
        _pictures,
        **{**GPT, "vocab_size": 97, "n_positions": 16},
    ),
    "siglip": hf("SiglipModel", "SiglipConfig", _pairs, **without(_PAIR, "projection_dim")),
    "align": hf(
        "AlignModel",
        "AlignConfig",
        _pairs,
        projection_dim=8,
        text_config=ENCODER,
        vision_config={
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "depthwise_padding": [],
            "drop_connect_rate": 0.0,
            "hidden_dim": 16,
        },
    ),
    "altclip": hf(
        "AltCLIPModel",
        "AltCLIPConfig",
        _pairs,
        projection_dim=16,
        text_config={**ENCODER, "project_dim": 16, "max_position_embeddings": 70},
        vision_config=_CLIP_VISION,
    ),
    "chinese_clip": hf(
        "ChineseCLIPModel",
        "ChineseCLIPConfig",
        _pairs,
        projection_dim=16,
        text_config=ENCODER,
        vision_config=_CLIP_VISION,
    ),
    "blip": hf(
        "BlipForConditionalGeneration",
        "BlipConfig",
        _captions,
        projection_dim=16,
        text_config={**ENCODER, "encoder_hidden_size": 32, "sep_token_id": 2},
        vision_config=_CLIP_VISION,
    ),
    "git": hf("GitForCausalLM", "GitConfig", _captions, **ENCODER, vision_config=_CLIP_VISION),
    "lxmert": hf(
        "LxmertForQuestionAnswering",
        "LxmertConfig",
        _regions,
        **without(ENCODER, "num_hidden_layers"),
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=16,
        visual_pos_dim=4,
        num_qa_labels=10,
    ),
    "llava": hf(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _visual_text,
        vision_config={"model_type": "clip_vision_model", **_CLIP_VISION, "patch_size": 16},
        text_config={"model_type": "llama", **GROUPED},
        image_token_index=95,
        image_seq_length=4,
        vision_feature_layer=-1,
    ),
    "ast": hf(
        "ASTForAudioClassification",
        "ASTConfig",
        _spectrograms,
        **_DEC,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        num_labels=10,
    ),
    "whisper_classes": hf(
        "WhisperForAudioClassification",
        "WhisperConfig",
        _sound_classes,
        **without(S2S, "max_position_embeddings"),
        num_mel_bins=8,
        max_source_positions=12,
        num_labels=10,
        classifier_proj_size=16,
    ),
    "trocr": _captioner,
}
