"""Small models of many architectures, random weights, each with one global batch of 8 rows; no download.

`CATALOGUE[name]() -> (model, batch)`; `batch` holds labels, the model returns its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]
ROWS, LENGTH, VOCABULARY = 8, 12, 96


def ids(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(ROWS, channels, size, size, generator=torch.Generator().manual_seed(0))


def _text(*, mask: bool = False, seq2seq: bool = False) -> dict[str, Any]:
    tokens = ids()
    labels = ids(seed=1 if seq2seq else 0).clone()
    labels[0, 4:] = -100
    batch: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    if mask:
        attention = torch.ones_like(tokens)
        attention[1, 9:] = 0
        attention[5, 7:] = 0
        batch["attention_mask"] = attention
    return batch


def classes(count: int = 10) -> torch.Tensor:
    return torch.arange(ROWS) % count


def hf(model: str, config: str, batch: Callable[[], dict[str, Any]], **sizes: Any) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)), batch()

    return make


_DECODER = {
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
GROUPED = {**_DECODER, "num_key_value_heads": 2}
_EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**_DECODER, **NO_DROP}
S2S = {
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
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def pixels() -> dict[str, Any]:
    return {"pixel_values": images(), "labels": classes()}


def masked() -> dict[str, Any]:
    return _text(mask=True)


def _s2s() -> dict[str, Any]:
    return _text(mask=True, seq2seq=True)


def _sound() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_features": torch.randn(ROWS, 8, 24, generator=generator), "labels": ids()}


def _waves() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_values": torch.randn(ROWS, 400, generator=generator), "labels": classes()}


CATALOGUE: dict[str, Callable[[], Made]] = {
    "gpt2": hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        masked,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "bert": hf("BertForMaskedLM", "BertConfig", masked, **ENCODER),
    "llama": hf("LlamaForCausalLM", "LlamaConfig", masked, **GROUPED),
    "qwen3": hf("Qwen3ForCausalLM", "Qwen3Config", masked, **GROUPED, head_dim=8),
    "t5": hf("T5ForConditionalGeneration", "T5Config", _s2s, **_T5),
    "gptj": hf(
        "GPTJForCausalLM",
        "GPTJConfig",
        masked,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "whisper": hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _sound,
        **{k: v for k, v in S2S.items() if k != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
    ),
    "mixtral": hf("MixtralForCausalLM", "MixtralConfig", masked, **_EXPERTS, num_local_experts=4),
    "mistral": hf("MistralForCausalLM", "MistralConfig", masked, **GROUPED, sliding_window=None),
    "opt": hf(
        "OPTForCausalLM",
        "OPTConfig",
        masked,
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        pad_token_id=0,
    ),
    "gpt_neox": hf("GPTNeoXForCausalLM", "GPTNeoXConfig", masked, **_DECODER),
    "gpt_neo": hf(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        masked,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        intermediate_size=64,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        window_size=4,
    ),
    "bloom": hf(
        "BloomForCausalLM",
        "BloomConfig",
        masked,
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "falcon": hf("FalconForCausalLM", "FalconConfig", masked, **_DECODER, attention_dropout=0.0, hidden_dropout=0.0),
    "phi3": hf("Phi3ForCausalLM", "Phi3Config", masked, **GROUPED),
    "phi": hf("PhiForCausalLM", "PhiConfig", masked, **_DECODER),
    "gemma": hf("GemmaForCausalLM", "GemmaConfig", masked, **GROUPED, head_dim=8),
    "gemma2": hf("Gemma2ForCausalLM", "Gemma2Config", masked, **GROUPED, head_dim=8, sliding_window=8),
    "qwen2": hf("Qwen2ForCausalLM", "Qwen2Config", masked, **GROUPED),
    "qwen2_moe": hf(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        masked,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
    "stablelm": hf("StableLmForCausalLM", "StableLmConfig", masked, **GROUPED),
    "starcoder2": hf("Starcoder2ForCausalLM", "Starcoder2Config", masked, **GROUPED),
    "olmo": hf("OlmoForCausalLM", "OlmoConfig", masked, **GROUPED),
    "cohere": hf("CohereForCausalLM", "CohereConfig", masked, **GROUPED),
    "codegen": hf(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        masked,
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "mpt": hf(
        "MptForCausalLM", "MptConfig", masked, vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=64
    ),
    "roberta": hf("RobertaForMaskedLM", "RobertaConfig", masked, **ENCODER),
    "albert": hf("AlbertForMaskedLM", "AlbertConfig", masked, **ENCODER, embedding_size=16),
    "distilbert": hf(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        masked,
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "electra": hf("ElectraForMaskedLM", "ElectraConfig", masked, **ENCODER, embedding_size=16),
    "deberta_v2": hf(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        masked,
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "xlnet": hf(
        "XLNetLMHeadModel",
        "XLNetConfig",
        masked,
        vocab_size=VOCABULARY,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
        dropout=0.0,
    ),
    "bart": hf("BartForConditionalGeneration", "BartConfig", _s2s, **S2S),
    "pegasus": hf("PegasusForConditionalGeneration", "PegasusConfig", _s2s, **S2S),
    "marian": hf("MarianMTModel", "MarianConfig", _s2s, **S2S),
    "wav2vec2": hf(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        _waves,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[8, 8],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_labels=10,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        classifier_proj_size=16,
        feat_extract_norm="layer",
    ),
    "mamba": hf(
        "MambaForCausalLM",
        "MambaConfig",
        _text,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
    ),
    "longformer": hf("LongformerForMaskedLM", "LongformerConfig", masked, **ENCODER, attention_window=[4, 4]),
    "funnel": hf(
        "FunnelForMaskedLM",
        "FunnelConfig",
        masked,
        vocab_size=VOCABULARY,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    ),
}
