"""More text models of the catalogue: architectures, heads and losses that no rule was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sizes_and_batches import (
    DECODER,
    ENCODER,
    GPT,
    GROUPED,
    ROWS,
    S2S,
    T5,
    VOCABULARY,
    Made,
    classes,
    hf,
    ids,
    masked,
    pairs_of_texts,
    seeded,
    without,
)


def _without_labels() -> dict[str, Any]:
    return without(masked(), "labels")


def _classes() -> dict[str, Any]:
    return {**_without_labels(), "labels": classes(3)}


def _scores() -> dict[str, Any]:
    return {**_without_labels(), "labels": torch.randn(ROWS, generator=seeded())}


def _several_labels() -> dict[str, Any]:
    chosen = torch.randint(2, (ROWS, 3), generator=seeded())
    return {**_without_labels(), "labels": chosen.float()}


def _tokens() -> dict[str, Any]:
    batch = masked()
    return {**batch, "labels": torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] % 3)}


def _spans() -> dict[str, Any]:
    start = classes(5)
    return {**_without_labels(), "start_positions": start, "end_positions": start + 2}


def _choices() -> dict[str, Any]:
    tokens = torch.stack([ids(), ids(seed=1)], dim=1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": classes(2)}


def _next_sentence() -> dict[str, Any]:
    return {**masked(), "next_sentence_label": classes(2)}


def _ended() -> dict[str, Any]:
    """Each row ends once in the token that BART pools at."""
    tokens = ids()
    tokens[:, -1] = 2
    return {"input_ids": tokens, "labels": classes(3)}


_PADDED_GPT: dict[str, Any] = {**GPT, "pad_token_id": 0}
_XLM: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_position_embeddings": 64,
    "pad_index": 0,
}
_THREE = {"num_labels": 3}

HEADS: dict[str, Callable[[], Made]] = {
    "bert_pretraining": hf("BertForPreTraining", "BertConfig", _next_sentence, **ENCODER),
    "bert_classes": hf("BertForSequenceClassification", "BertConfig", _classes, **ENCODER, **_THREE),
    "bert_regression": hf("BertForSequenceClassification", "BertConfig", _scores, **ENCODER, num_labels=1),
    "bert_several": hf("BertForSequenceClassification", "BertConfig", _several_labels, **ENCODER, **_THREE),
    "bert_tokens": hf("BertForTokenClassification", "BertConfig", _tokens, **ENCODER, **_THREE),
    "bert_spans": hf("BertForQuestionAnswering", "BertConfig", _spans, **ENCODER),
    "bert_choices": hf("BertForMultipleChoice", "BertConfig", _choices, **ENCODER),
    "bert_decoder": hf("BertLMHeadModel", "BertConfig", masked, **ENCODER, is_decoder=True),
    "roberta_classes": hf("RobertaForSequenceClassification", "RobertaConfig", _classes, **ENCODER, **_THREE),
    "gpt2_classes": hf("GPT2ForSequenceClassification", "GPT2Config", _classes, **_PADDED_GPT, **_THREE),
    "gpt2_tokens": hf(
        "GPT2ForTokenClassification", "GPT2Config", _tokens, **_PADDED_GPT, **_THREE, classifier_dropout=0.0
    ),
    "gpt2_spans": hf("GPT2ForQuestionAnswering", "GPT2Config", _spans, **_PADDED_GPT),
    "llama_classes": hf("LlamaForSequenceClassification", "LlamaConfig", _classes, **GROUPED, **_THREE),
    "bart_classes": hf("BartForSequenceClassification", "BartConfig", _ended, **S2S, **_THREE),
    "t5_classes": hf("T5ForSequenceClassification", "T5Config", _ended, **T5, **_THREE, eos_token_id=2),
    "t5_tokens": hf("T5ForTokenClassification", "T5Config", _tokens, **T5, **_THREE),
}

ENCODERS: dict[str, Callable[[], Made]] = {
    "xlm_roberta": hf("XLMRobertaForMaskedLM", "XLMRobertaConfig", masked, **ENCODER),
    "camembert": hf("CamembertForMaskedLM", "CamembertConfig", masked, **ENCODER),
    "bigbird": hf("BigBirdForMaskedLM", "BigBirdConfig", masked, **ENCODER, attention_type="original_full"),
    "bigbird_sparse": hf("BigBirdForMaskedLM", "BigBirdConfig", masked, **ENCODER, block_size=2, num_random_blocks=1),
    "xlm": hf("XLMWithLMHeadModel", "XLMConfig", masked, **_XLM),
    "flaubert": hf("FlaubertWithLMHeadModel", "FlaubertConfig", masked, **_XLM),
    "deberta": hf(
        "DebertaForMaskedLM", "DebertaConfig", masked, **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "luke": hf("LukeForMaskedLM", "LukeConfig", masked, **ENCODER, entity_vocab_size=10, entity_emb_size=16),
    "rembert": hf("RemBertForMaskedLM", "RemBertConfig", masked, **ENCODER, input_embedding_size=16),
    "megatron_bert": hf("MegatronBertForMaskedLM", "MegatronBertConfig", masked, **ENCODER),
    "convbert": hf("ConvBertForMaskedLM", "ConvBertConfig", masked, **ENCODER, embedding_size=32),
    "ibert": hf("IBertForMaskedLM", "IBertConfig", masked, **ENCODER),
    "mobilebert": hf(
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        masked,
        **ENCODER,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    "data2vec_text": hf("Data2VecTextForMaskedLM", "Data2VecTextConfig", masked, **ENCODER),
    "esm": hf("EsmForMaskedLM", "EsmConfig", masked, **ENCODER, mask_token_id=3, position_embedding_type="rotary"),
    "esm_absolute": hf("EsmForMaskedLM", "EsmConfig", masked, **ENCODER, mask_token_id=3, token_dropout=True),
    "yoso": hf("YosoForMaskedLM", "YosoConfig", masked, **ENCODER),
    "mra": hf("MraForMaskedLM", "MraConfig", masked, **ENCODER),
    "roberta_prelayernorm": hf("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", masked, **ENCODER),
    "xlm_roberta_xl": hf("XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", masked, **ENCODER),
    "xmod": hf("XmodForMaskedLM", "XmodConfig", masked, **ENCODER, default_language="en_XX"),
    "splinter": hf("SplinterForQuestionAnswering", "SplinterConfig", _spans, **ENCODER),
    "modernbert_classes": hf(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _classes,
        **DECODER,
        **_THREE,
    ),
    "canine": hf(
        "CanineForSequenceClassification",
        "CanineConfig",
        _classes,
        **ENCODER,
        **_THREE,
        downsampling_rate=2,
        local_transformer_stride=4,
        num_hash_buckets=16,
    ),
    "reformer": hf(
        "ReformerForMaskedLM",
        "ReformerConfig",
        masked,
        **without(ENCODER, "hidden_dropout_prob", "intermediate_size"),
        attention_head_size=8,
        feed_forward_size=64,
        attn_layers=["local", "local"],
        axial_pos_embds=False,
        local_attn_chunk_length=4,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lm_head_dropout=0.0,
        is_decoder=False,
    ),
    "eurobert": hf("EuroBertForMaskedLM", "EuroBertConfig", masked, **GROUPED),
}

TRANSLATORS: dict[str, Callable[[], Made]] = {
    "mbart": hf("MBartForConditionalGeneration", "MBartConfig", pairs_of_texts, **S2S),
    "m2m_100": hf(
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        pairs_of_texts,
        **S2S,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    ),
    "blenderbot": hf("BlenderbotForConditionalGeneration", "BlenderbotConfig", pairs_of_texts, **S2S),
    "blenderbot_small": hf("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", pairs_of_texts, **S2S),
    "bigbird_pegasus": hf(
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        pairs_of_texts,
        **S2S,
        attention_type="original_full",
    ),
    "plbart": hf("PLBartForConditionalGeneration", "PLBartConfig", pairs_of_texts, **S2S),
    "mvp": hf("MvpForConditionalGeneration", "MvpConfig", pairs_of_texts, **S2S),
    "nllb_moe": hf(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        pairs_of_texts,
        **S2S,
        num_experts=4,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=32,
        router_jitter_noise=0.0,
        moe_token_dropout=0.0,
    ),
    "fsmt": hf(
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        pairs_of_texts,
        **without(S2S, "vocab_size"),
        src_vocab_size=VOCABULARY,
        tgt_vocab_size=VOCABULARY,
        langs=["en", "de"],
    ),
    "led": hf(
        "LEDForConditionalGeneration",
        "LEDConfig",
        pairs_of_texts,
        **without(S2S, "max_position_embeddings"),
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=4,
    ),
    "prophetnet": hf(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        pairs_of_texts,
        vocab_size=VOCABULARY,
        hidden_size=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=64,
    ),
    "mt5": hf("MT5ForConditionalGeneration", "MT5Config", pairs_of_texts, **T5),
    "umt5": hf("UMT5ForConditionalGeneration", "UMT5Config", pairs_of_texts, **T5),
    "longt5": hf("LongT5ForConditionalGeneration", "LongT5Config", pairs_of_texts, **T5, local_radius=3),
    "longt5_global": hf(
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        pairs_of_texts,
        **T5,
        local_radius=3,
        global_block_size=4,
        encoder_attention_type="transient-global",
    ),
    "bert_to_bert": lambda: _bert_to_bert(),
}


def _bert_to_bert() -> Made:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(ENCODER)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), transformers.BertConfig(**sizes)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config=config), pairs_of_texts()


TEXT: dict[str, Callable[[], Made]] = {
    **HEADS,
    **ENCODERS,
    **TRANSLATORS,
}
