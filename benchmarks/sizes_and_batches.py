"""What small models have in common: their sizes, as configurations take them, and global batches of 8 rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]
Batch = Callable[[], dict[str, Any]]
ROWS, LENGTH, VOCABULARY = 8, 12, 96


# -- models


def hf(model: str, config: str, batch: Batch, **sizes: Any) -> Callable[[], Made]:
    """A model of transformers with random weights; no download."""

    def make() -> Made:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)), batch()

    return make


def own(kind: Callable[[], nn.Module], batch: Batch) -> Callable[[], Made]:
    """A model written here."""

    def make() -> Made:
        torch.manual_seed(0)
        return kind(), batch()

    return make


def without(sizes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The sizes less those of these names."""
    return {name: value for name, value in sizes.items() if name not in names}


# -- sizes

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2}
NO_DROP: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER: dict[str, Any] = {**DECODER, **NO_DROP}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
STATES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
# Encoders and decoders of the family of BART, and of that of T5.
S2S: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
VISION_BODY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VISION_SIZES: dict[str, Any] = {**VISION_BODY, "num_labels": 10, **NO_DROP}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 10,
    "drop_path_rate": 0.0,
}
SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "num_labels": 10,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
    **NO_DROP,
}
CONVNEXT: dict[str, Any] = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_stages": 2,
    "patch_size": 4,
    "num_labels": 10,
}
WAVES: dict[str, Any] = {
    "hidden_size": 32,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "apply_spec_augment": False,
    "feat_extract_norm": "layer",
}
LISTENER: dict[str, Any] = {
    **WAVES,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 16,
    "num_labels": 10,
}
FORECAST: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 10,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


# -- batches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=seeded(seed))


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(ROWS, channels, size, size, generator=seeded())


def classes(count: int = 10) -> torch.Tensor:
    return torch.arange(ROWS) % count


def unmasked(seed: int = 0) -> dict[str, Any]:
    """Text, and labels (of this seed) that do not all count."""
    labels = ids(seed=seed)
    labels[0, 4:] = -100
    return {"input_ids": ids(), "labels": labels}


def masked(seed: int = 0) -> dict[str, Any]:
    """The same with rows of different lengths."""
    batch = unmasked(seed)
    attention = torch.ones_like(batch["input_ids"])
    attention[1, 9:] = 0
    attention[5, 7:] = 0
    return {**batch, "attention_mask": attention}


def pairs_of_texts() -> dict[str, Any]:
    return masked(seed=1)


def pixels() -> dict[str, Any]:
    return {"pixel_values": images(), "labels": classes()}


def large_pixels() -> dict[str, Any]:
    return {"pixel_values": images(64), "labels": classes()}


def waves() -> dict[str, Any]:
    return {"input_values": torch.randn(ROWS, 400, generator=seeded()), "labels": classes()}


def spectra(labels: torch.Tensor) -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 8, 24, generator=seeded()), "labels": labels}


def series() -> dict[str, Any]:
    past, future, lags = 10, 4, 3
    values = torch.randn(ROWS, past + lags + future, generator=seeded())
    time = torch.randn(ROWS, past + lags + future, 2, generator=seeded())
    return {
        "past_values": values[:, : past + lags],
        "past_time_features": time[:, : past + lags],
        "past_observed_mask": torch.ones(ROWS, past + lags),
        "future_values": values[:, past + lags :],
        "future_time_features": time[:, past + lags :],
    }
