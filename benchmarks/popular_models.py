"""Models of sound, of regions and tables, of detection and of forecasts that many people train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.own import WithLoss
from benchmarks.sizes_and_batches import (
    ENCODER,
    FORECAST,
    GROUPED,
    LENGTH,
    LISTENER,
    ROWS,
    VISION_BODY,
    VOCABULARY,
    WAVES,
    Made,
    hf,
    ids,
    images,
    masked,
    own,
    seeded,
    series,
    waves,
    without,
)


def _transcripts() -> dict[str, Any]:
    labels = ids(6, seed=1)
    labels[0, 4:] = -100
    return {"input_values": torch.randn(ROWS, 400, generator=seeded()), "labels": labels}


def _cells() -> dict[str, Any]:
    kinds = [torch.randint(count, (ROWS, LENGTH), generator=seeded()) for count in (3, 4, 4, 2, 4, 4, 4)]
    return {**masked(), "token_type_ids": torch.stack(kinds, dim=-1)}


def _answers_about_regions() -> dict[str, Any]:
    batch = without(masked(), "labels")
    answers = torch.rand(ROWS, 10, generator=seeded())
    return {
        **batch,
        "visual_embeds": torch.randn(ROWS, 5, 16, generator=seeded()),
        "labels": answers / answers.sum(dim=1, keepdim=True),
    }


def _pairs() -> dict[str, Any]:
    return {**masked(), "pixel_values": images()}


def _masked_pairs() -> dict[str, Any]:
    tokens, chosen = ids(), torch.rand(ROWS, LENGTH, generator=seeded()) < 0.3
    hidden = torch.rand(ROWS, 16, generator=seeded()) < 0.3
    return {
        "input_ids": tokens,
        "input_ids_masked": tokens.masked_fill(chosen, 3),
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": images(),
        "mlm_labels": torch.where(chosen, tokens, torch.full_like(tokens, -100)),
        "mim_labels": torch.where(hidden, torch.arange(16) % 8, torch.full((ROWS, 16), -100)),
        "bool_masked_pos": hidden,
        "itm_labels": torch.arange(ROWS) % 2,
        "return_loss": True,
    }


def _questions_to_images() -> dict[str, Any]:
    text = ids().clamp(max=VOCABULARY - 2)
    text[:, :4] = VOCABULARY - 1
    labels = text.masked_fill(text == VOCABULARY - 1, -100)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": images(), "labels": labels}


def _objects() -> dict[str, Any]:
    return {"pixel_values": images(64), "labels": (torch.arange(ROWS)[:, None] + torch.arange(5)) % 7}


def _features() -> dict[str, Any]:
    return {"pixel_values": images(), "target": torch.randn(ROWS, 16, 4, 4, generator=seeded())}


class _Distilled(nn.Module):
    """An encoder of images that learns the features of another, in windows and with relative positions."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        sizes: dict[str, Any] = without(VISION_BODY, "intermediate_size")
        config = transformers.SamVisionConfig(
            **sizes, output_channels=16, window_size=3, global_attn_indexes=[1], mlp_dim=64, initializer_range=0.02
        )
        self.encoder = transformers.SamVisionModel(config)

    def forward(self, pixel_values: Tensor, target: Tensor) -> WithLoss:
        return WithLoss(F.mse_loss(self.encoder(pixel_values).last_hidden_state, target))


class _Detector(nn.Module):
    """DETR with one class for each query: matching queries and boxes is no part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        backbone: dict[str, Any] = {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
        }
        config = transformers.DetrConfig(
            backbone_config={**backbone, "layer_type": "basic", "out_features": ["stage2"]},
            d_model=32,
            num_queries=5,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            dropout=0.0,
        )
        self.queries = transformers.DetrModel(config)
        self.classes = nn.Linear(32, 7)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> WithLoss:
        scores = self.classes(self.queries(pixel_values).last_hidden_state)
        return WithLoss(F.cross_entropy(scores.flatten(0, 1), labels.flatten()))


POPULAR: dict[str, Callable[[], Made]] = {
    "hubert": hf("HubertForSequenceClassification", "HubertConfig", waves, **LISTENER, vocab_size=VOCABULARY),
    "wavlm": hf(
        "WavLMForSequenceClassification", "WavLMConfig", waves, **LISTENER, vocab_size=VOCABULARY, num_buckets=16
    ),
    "wav2vec2_ctc": hf("Wav2Vec2ForCTC", "Wav2Vec2Config", _transcripts, **LISTENER, vocab_size=VOCABULARY),
    "speecht5": hf(
        "SpeechT5ForSpeechToText",
        "SpeechT5Config",
        _transcripts,
        **WAVES,
        vocab_size=VOCABULARY,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        positional_dropout=0.0,
        encoder_max_relative_position=8,
        max_text_positions=32,
    ),
    "informer": hf(
        "InformerForPrediction",
        "InformerConfig",
        series,
        **FORECAST,
    ),
    "autoformer": hf(
        "AutoformerForPrediction",
        "AutoformerConfig",
        series,
        **FORECAST,
        label_length=4,
        moving_average=5,
    ),
    "tapas": hf("TapasForMaskedLM", "TapasConfig", _cells, **ENCODER, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4]),
    "visual_bert": hf(
        "VisualBertForQuestionAnswering",
        "VisualBertConfig",
        _answers_about_regions,
        **ENCODER,
        visual_embedding_dim=16,
        num_labels=10,
    ),
    "flava": hf(
        "FlavaForPreTraining",
        "FlavaConfig",
        _masked_pairs,
        hidden_size=32,
        projection_dim=16,
        init_codebook=False,
        image_config={**VISION_BODY, "vocab_size": VOCABULARY},
        text_config=ENCODER,
        multimodal_config=without(VISION_BODY, "image_size", "patch_size"),
        image_codebook_config={},
    ),
    "bridgetower": hf(
        "BridgeTowerForMaskedLM",
        "BridgeTowerConfig",
        _pairs,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        text_config={**ENCODER, "hidden_size": 64, "type_vocab_size": 1},
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    ),
    "blip_2": hf(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        _questions_to_images,
        num_query_tokens=4,
        image_token_index=VOCABULARY - 1,
        vision_config={**VISION_BODY, "initializer_range": 0.02},
        qformer_config={**ENCODER, "encoder_hidden_size": 32},
        text_config={"model_type": "llama", **GROUPED},
    ),
    "sam_vision": own(_Distilled, _features),
    "detr": own(_Detector, _objects),
}
