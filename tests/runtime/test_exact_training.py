"""Ways of training that must equal the local run: rows and lengths that change, accumulation, clipping, frozen and
unused parameters, a model of one's own, other language models, published sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def three() -> dict[str, Any]:
    return {"": whalepy.replicate(3, shares=(5, 2, 1))}


def split_blocks() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(3, 1))}


def nested_blocks() -> dict[str, Any]:
    return {"": whalepy.replicate(2), "transformer.h.*": whalepy.split(2, shares=(3, 1))}


def logits(output: Any) -> Tensor:
    return output.logits


# -- steps that differ


def changing_rows() -> models.Made:
    """Eight rows, then so few that the ranks with the smaller shares have none."""
    return models.gpt2(models.language_batches([(8, 12), (2, 12), (1, 12)]))


def changing_lengths() -> models.Made:
    return models.gpt2(models.language_batches([(8, 12), (8, 7), (6, 20)]))


def padded() -> models.Made:
    """Rows padded to one length, by an attention mask."""
    ids = models.tokens()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[6, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return models.bert([{"input_ids": ids, "attention_mask": mask, "labels": labels}])


STEPS: dict[str, Run] = {
    "ranks without rows": Run(changing_rows, three, 3),
    "another length in each step": Run(changing_lengths, split_blocks, 2, dtype=torch.float32),
    "padding": Run(padded, uneven, 2),
    "two train_steps for each optimizer step": Run(changing_lengths, uneven, 2, accumulate=2),
    "evaluation and outputs, replicate": Run(models.gpt2, uneven, 2, steps=1, evaluate=True, output=logits),
    "evaluation and outputs, split": Run(models.gpt2, split_blocks, 2, steps=1, evaluate=True, output=logits),
}
MORE_STEPS: dict[str, Run] = {
    "ranks without rows under replicate > split": Run(changing_rows, nested_blocks, 4),
    "accumulation under split": Run(models.gpt2, split_blocks, 2, accumulate=2, dtype=torch.float32),
}


@pytest.mark.parametrize("run", STEPS.values(), ids=STEPS)
def test_steps(workers: Pool, run: Run) -> None:
    compare(workers, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", MORE_STEPS.values(), ids=MORE_STEPS)
def test_more_steps(workers: Pool, run: Run) -> None:
    compare(workers, run)


# -- the norm


@pytest.mark.parametrize(
    "norm_type", [2.0, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(float("inf"), marks=pytest.mark.slow)]
)
def test_clipping(workers: Pool, norm_type: float) -> None:
    """`shared` of the outcomes holds the norm: its bits are the same on every rank."""
    compare(workers, Run(models.gpt2, nested_blocks, 4, steps=2, clip=(0.01, norm_type)))


# -- parameters


def frozen() -> models.Made:
    """Embeddings and one bias do not train."""
    model, batches = models.bert()
    for name, parameter in model.named_parameters():
        if "embeddings" in name or name.endswith("output.dense.bias"):
            parameter.requires_grad_(False)
    return model, batches


class Partly(nn.Module):
    """One layer is not read, one is read and its output thrown away, or written over."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unread, self.thrown, self.covered = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.thrown(x)
        y = self.covered(x).clone()
        y.copy_(self.used(x))
        return y.square().mean()


def partly() -> models.Made:
    torch.manual_seed(0)
    return Partly(), [(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)),)]


PARAMETERS: dict[str, Run] = {
    "frozen, replicate": Run(frozen, uneven, 2),
    "frozen, split": Run(frozen, lambda: {"": whalepy.split(2, shares=(3, 1))}, 2),
    "unused, replicate": Run(partly, uneven, 2),
    "unused, split": Run(partly, lambda: {"": whalepy.split(2, shares=(2, 1))}, 2),
    "unused, microbatches": Run(partly, uneven, 2, options={"microbatches": 2}),
    "tied, of two gradient types": Run(models.scaled_twice, lambda: {"mlp": whalepy.split(3, shares=(5, 2, 1))}, 3),
}


@pytest.mark.parametrize("run", PARAMETERS.values(), ids=PARAMETERS)
def test_parameters(workers: Pool, run: Run) -> None:
    compare(workers, run)


# -- a model of one's own, with loss_fn and tuples


def own(annotations: Callable[[], dict[str, Any]], world: int, **more: Any) -> Run:
    make = lambda: models.residual((8, 8, 3))  # noqa: E731
    return Run(make, annotations, world, loss_fn=models.classes_loss, evaluate=True, output=lambda y: y, **more)


OWN: dict[str, Run] = {
    "replicate": own(uneven, 2),
    "split": own(lambda: {"": whalepy.split(2, shares=(3, 1))}, 2),
    "split of the MLP": own(lambda: {"mlp": whalepy.split(3, shares=(5, 2, 1))}, 3, dtype=torch.float32),
    "split convolutions": own(lambda: {"block": whalepy.split(2, shares=(3, 1))}, 2),
    "head split by classes": own(lambda: {"": whalepy.replicate(2), "head": whalepy.split(2, shares=(3, 1))}, 4),
}


@pytest.mark.parametrize("run", OWN.values(), ids=OWN)
def test_own_model(workers: Pool, run: Run) -> None:
    compare(workers, run)


# -- other language models


def llama_blocks() -> dict[str, Any]:
    return {"model.layers.*": whalepy.split(2)}


OTHERS: dict[str, Run] = {
    "llama, replicate": Run(models.llama, uneven, 2),
    "llama, split of blocks": Run(models.llama, llama_blocks, 2),
    "gptj, split of blocks": Run(models.gptj, split_blocks, 2),
}


@pytest.mark.parametrize("run", OTHERS.values(), ids=OTHERS)
def test_other_models(workers: Pool, run: Run) -> None:
    compare(workers, run)


# -- published sizes


def gpt2_124m() -> models.Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)), models.language_batches(
        [(4, 32)]
    )


def bert_base() -> models.Made:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config), models.language_batches([(4, 32)])


PUBLISHED: dict[str, Run] = {
    "gpt2 124M": Run(gpt2_124m, split_blocks, 2, steps=1, dtype=torch.float32),
    "bert base": Run(bert_base, uneven, 2, steps=1, dtype=torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", PUBLISHED.values(), ids=PUBLISHED)
def test_published_size(workers: Pool, run: Run) -> None:
    compare(workers, run, timeout_s=500.0)
