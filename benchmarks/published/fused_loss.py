"""GPTs whose loss is one kernel that keeps the logits as they are, as llm-foundry trains them.

Source: mosaicml/llm-foundry, llmfoundry/models/mpt/modeling_mpt.py: `loss_fn` is "fused_crossentropy" by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import whalepy


@torch.library.custom_op("published::fused_cross_entropy", mutates_args=())
def fused_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every row, in float32."""
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


@fused_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.float32)


@torch.library.custom_op("published::fused_cross_entropy_backward", mutates_args=())
def fused_cross_entropy_backward(gradient: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the logits, in their type."""
    chosen = nn.functional.one_hot(labels, logits.shape[-1])
    return ((logits.float().softmax(-1) - chosen) * gradient[:, None]).to(logits.dtype)


@fused_cross_entropy_backward.register_fake
def _(gradient: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return fused_cross_entropy_backward(gradient, *ctx.saved_tensors), None


fused_cross_entropy.register_autograd(_backward, setup_context=_keep)
whalepy.rule("published::fused_cross_entropy", "n C, n -> n")


class Gpt(nn.Module):
    """GPT-2 of transformers with the fused loss."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        import transformers

        kept = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        self.inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(**kept))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.inner.lm_head(self.inner.transformer(input_ids).last_hidden_state)
        return fused_cross_entropy(logits.flatten(0, 1), labels.flatten()).mean()


def made(config: Mapping[str, Any], rows: int, tokens: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and a batch, as a factory of `whalepy plan` returns them."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return Gpt(config), {"input_ids": ids, "labels": torch.zeros_like(ids)}


def factory_in(folder: Path, config: Mapping[str, Any], rows: int, tokens: int) -> str:
    """A file with a factory of this model, as `whalepy plan` takes it."""
    path = folder / "factory.py"
    lines = [
        "from benchmarks.published.fused_loss import made",
        f"def make(): return made({dict(config)!r}, {rows}, {tokens})",
    ]
    path.write_text("\n".join(lines) + "\n")
    return f"{path}:make"
