"""Models of transformers, captured at one size and run at another: loss, gradients and buffers equal eager's."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.program.test_functionalise import run
from whalepy.program.capture import capture
from whalepy.program.capture_schema import writes

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

VOCABULARY = 48
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def gpt2() -> nn.Module:
    size = {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    config = transformers.GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **drop, vocab_size=VOCABULARY))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=VOCABULARY)
    )


def t5() -> nn.Module:
    size = {"num_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


def resnet() -> nn.Module:
    size = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**size, num_labels=2))


def text(rows: int, length: int) -> dict[str, Tensor]:
    """Tokens, labels of which some are ignored, and a mask with padding."""
    tokens = torch.randint(1, VOCABULARY, (rows, length))
    labels = tokens.clone()
    labels[0, : length // 2] = -100
    mask = torch.ones_like(tokens)
    mask[-1, length - 2 :] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def translation(rows: int, length: int) -> dict[str, Tensor]:
    """A target of another length than the source, and of the same at capture."""
    batch = text(rows, length)
    if rows != 4:
        batch["labels"] = torch.randint(1, VOCABULARY, (rows, length + 5))
    return batch


def images(rows: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, size, size), "labels": torch.randint(2, (rows,))}


# The size at capture: 4 rows of 16 tokens, T5's target as long as its source. 32 rows equal the width of the model.
CASES: list[Any] = [
    pytest.param(gpt2, text, [(4, 16), (3, 23), (32, 5)], id="gpt2"),
    pytest.param(bert, text, [(4, 16), (3, 23)], id="bert"),
    pytest.param(llama, text, [(4, 16), (3, 23), (1, 9)], id="llama"),
    pytest.param(t5, translation, [(4, 16), (3, 23)], id="t5"),
    pytest.param(vit, images, [(4, 16), (3, 16)], id="vit"),
    pytest.param(resnet, images, [(4, 16), (3, 32)], id="resnet"),
]


@pytest.mark.parametrize(("make", "batch", "sizes"), CASES)
def test_model_equals_eager_at_other_sizes(
    make: Callable[[], nn.Module], batch: Callable[[int, int], dict[str, Tensor]], sizes: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    model = make().train()
    captured = capture(model, (), batch(*sizes[0]))
    assert not any(writes(node) for node in captured.graph.graph.nodes)
    for rows, length in sizes:
        inputs = batch(rows, length)
        leaves = pytree.tree_leaves(((), inputs))
        assert captured.check_sizes(captured.bind([tuple(leaf.shape) for leaf in leaves])) is None
        eager = copy.deepcopy(model)
        model.zero_grad()
        expected = eager(**inputs).loss
        expected.backward()
        (loss,), mutations = run(captured, *leaves)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        check_gradients(model, eager)
        for name, buffer in eager.named_buffers():
            new = mutations.get(name, dict(model.named_buffers())[name])
            torch.testing.assert_close(new, buffer, rtol=1e-6, atol=1e-6, msg=name)


def check_gradients(model: nn.Module, eager: nn.Module) -> None:
    """|a - b| <= 1e-5 times the largest gradient in the model."""
    expected = {name: p.grad for name, p in eager.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        grad = expected[name]
        assert (parameter.grad is None) == (grad is None), name
        if grad is not None and parameter.grad is not None:
            assert float((parameter.grad - grad).abs().max()) <= 1e-5 * scale, name


def test_batch_norm_statistics_are_mutations() -> None:
    captured = capture(resnet().train(), (), images(4, 16))
    statistics = [name for name in captured.mutations if "embedder" in name]
    prefix = "resnet.embedder.embedder.normalization."
    assert sorted(statistics) == [prefix + "num_batches_tracked", prefix + "running_mean", prefix + "running_var"]
    evaluated = capture(resnet().train(), (), images(4, 16), training=False)
    assert evaluated.mutations == ()


def test_evaluation_equals_eager() -> None:
    torch.manual_seed(0)
    model = resnet().train()
    captured = capture(model, (), images(4, 16), training=False, wants="outputs")
    assert model.training
    inputs = images(3, 16)
    expected = model.eval()(**inputs)
    results, _ = run(captured, *pytree.tree_leaves(((), inputs)))
    output = captured.unflatten(results)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_cache_in_the_output_becomes_none() -> None:
    captured = capture(llama().eval(), (), text(4, 16), training=False, wants="outputs")
    results, _ = run(captured, *pytree.tree_leaves(((), text(3, 9))))
    output = captured.unflatten(results)
    assert output.logits.shape == (3, 9, VOCABULARY)
    assert output.past_key_values is None


def test_tied_weights_are_one_placeholder() -> None:
    captured = capture(gpt2().train(), (), text(4, 16))
    assert captured.ties == {"lm_head.weight": "transformer.wte.weight"}
    names = [place.name for place in captured.placeholders]
    assert names.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in names


def test_meta_model_is_captured_without_weights() -> None:
    with torch.device("meta"):
        model = llama().train()
    captured = capture(model, (), text(4, 16))
    real = capture(llama().train(), (), text(4, 16))
    assert all(place.value.is_meta for place in captured.placeholders if place.value is not None)
    assert _operators(captured) == _operators(real)


def _operators(captured: Any) -> list[str]:
    """What runs, without copies that depend on the strides in which a device returns attention."""
    skipped = ("contiguous",)
    names = [str(node.target) for node in captured.graph.graph.nodes if node.op == "call_function"]
    return [name for name in names if not any(skip in name for skip in skipped)]


def test_a_size_beyond_a_table_is_an_error_with_the_numbers() -> None:
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=20)
    )
    captured = capture(model.train(), (), text(4, 16))
    bindings = captured.bind([(4, 21)] * 3)
    (symbol,) = captured.inputs[0].shape[1].free_symbols
    message = captured.check_sizes(bindings)
    assert message is not None
    limit = rf"the captured graph holds only where {symbol} <= 20 \(modeling_bert\.py:\d+\)"
    assert re.fullmatch(rf"{limit}, but {symbol} is 21 \(kwargs\['input_ids'\] dim 1\)", message)
