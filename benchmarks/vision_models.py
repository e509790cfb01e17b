"""Models of images and depth, and models written by hand: architectures that no rule was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.own_parts import PARTS
from benchmarks.own_sequences import SEQUENCES
from benchmarks.sizes_and_batches import (
    CONVNEXT,
    NO_DROP,
    ROWS,
    SEGFORMER,
    SWIN,
    VISION_SIZES,
    Made,
    hf,
    images,
    large_pixels,
    own,
    pixels,
    seeded,
    without,
)


def _masked_images() -> dict[str, Any]:
    return {"pixel_values": images(), "noise": torch.rand(ROWS, 16, generator=seeded())}


def _segments() -> dict[str, Any]:
    labels = torch.randint(10, (ROWS, 32, 32), generator=seeded())
    labels[0, :4] = 255
    return {"pixel_values": images(), "labels": labels}


def _depths() -> dict[str, Any]:
    return {"pixel_values": images(), "labels": torch.rand(ROWS, 64, 64, generator=seeded()) + 0.5}


def _without_dropout(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same with every dropout off, also those that no configuration reaches."""

    def quiet() -> Made:
        model, batch = make()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, batch

    return quiet


VISION: dict[str, Callable[[], Made]] = {
    **{name: own(*part) for name, part in {**PARTS, **SEQUENCES}.items()},
    "vit": hf("ViTForImageClassification", "ViTConfig", pixels, **VISION_SIZES),
    "resnet": hf(
        "ResNetForImageClassification",
        "ResNetConfig",
        pixels,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_labels=10,
    ),
    "swin": hf("SwinForImageClassification", "SwinConfig", pixels, **SWIN),
    "convnext": hf("ConvNextForImageClassification", "ConvNextConfig", pixels, **CONVNEXT),
    "deit": hf("DeiTForImageClassification", "DeiTConfig", pixels, **VISION_SIZES),
    "beit": hf("BeitForImageClassification", "BeitConfig", pixels, **VISION_SIZES, drop_path_rate=0.0),
    "dinov2": hf(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        pixels,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
        drop_path_rate=0.0,
    ),
    "mobilenet_v2": hf(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        pixels,
        image_size=32,
        num_labels=10,
        depth_multiplier=0.35,
        classifier_dropout_prob=0.0,
    ),
    "regnet": hf(
        "RegNetForImageClassification",
        "RegNetConfig",
        pixels,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        groups_width=4,
        num_labels=10,
    ),
    "segformer": hf("SegformerForImageClassification", "SegformerConfig", pixels, **SEGFORMER),
    "efficientnet": hf(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        pixels,
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
        depthwise_padding=[],
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        hidden_dim=320,
        num_labels=10,
    ),
    "mobilenet_v1": hf(
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        large_pixels,
        image_size=64,
        depth_multiplier=0.25,
        min_depth=4,
        classifier_dropout_prob=0.0,
        num_labels=10,
    ),
    "cvt": hf(
        "CvtForImageClassification",
        "CvtConfig",
        pixels,
        embed_dim=[8, 16, 16],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        mlp_ratio=[2.0, 2.0, 2.0],
        drop_path_rate=[0.0, 0.0, 0.0],
        num_labels=10,
    ),
    "pvt": hf(
        "PvtForImageClassification",
        "PvtConfig",
        pixels,
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        drop_path_rate=0.0,
        num_labels=10,
        **NO_DROP,
    ),
    "swinv2": hf("Swinv2ForImageClassification", "Swinv2Config", pixels, **SWIN),
    "donut_swin": hf("DonutSwinForImageClassification", "DonutSwinConfig", pixels, **SWIN),
    "dinov2_registers": hf(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        pixels,
        **without(VISION_SIZES, "intermediate_size"),
        drop_path_rate=0.0,
    ),
    "vit_msn": hf("ViTMSNForImageClassification", "ViTMSNConfig", pixels, **VISION_SIZES),
    "hiera": hf(
        "HieraForImageClassification",
        "HieraConfig",
        large_pixels,
        image_size=[64, 64],
        embed_dim=8,
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
        query_stride=[2, 2],
        num_query_pool=2,
        masked_unit_size=[8, 8],
        masked_unit_attention=[True, True, False],
        drop_path_rate=0.0,
        num_labels=10,
    ),
    "focalnet": hf(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        pixels,
        image_size=32,
        patch_size=4,
        embed_dim=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        drop_path_rate=0.0,
        num_labels=10,
    ),
    "bit": hf(
        "BitForImageClassification",
        "BitConfig",
        pixels,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_groups=4,
        num_labels=10,
    ),
    "swiftformer": hf(
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        large_pixels,
        image_size=64,
        depths=[1, 1],
        embed_dims=[8, 16],
        downsamples=[True, True],
        mlp_ratio=2,
        drop_path_rate=0.0,
        num_labels=10,
    ),
    "data2vec_vision": hf(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", pixels, **VISION_SIZES, drop_path_rate=0.0
    ),
    "segformer_masks": hf(
        "SegformerForSemanticSegmentation", "SegformerConfig", _segments, **SEGFORMER, decoder_hidden_size=16
    ),
    "dpt": _without_dropout(
        hf(
            "DPTForSemanticSegmentation",
            "DPTConfig",
            _segments,
            **{**VISION_SIZES, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 8, 8, 8],
            fusion_hidden_size=8,
            is_hybrid=False,
        )
    ),
    "glpn": hf(
        "GLPNForDepthEstimation",
        "GLPNConfig",
        _depths,
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        sr_ratios=[2, 2, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        patch_sizes=[7, 3, 3, 3],
        strides=[2, 2, 2, 2],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=8,
        drop_path_rate=0.0,
        **NO_DROP,
    ),
    "vit_mae": hf(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        _masked_images,
        **VISION_SIZES,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        mask_ratio=0.5,
    ),
}
