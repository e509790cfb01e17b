"""Frozen parameters cost no gradient, state or traffic; checkpointing in the model is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool

WIDTH, RANK, ROWS = 32, 2, 8


class Adapted(nn.Module):
    """A frozen layer with a low-rank update beside it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Network(nn.Module):
    """Three adapted layers; with `penalty` the loss has a term that does not depend on rows."""

    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.penalty = penalty

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        loss = F.mse_loss(x, target)
        if self.penalty:
            loss = loss + self.penalty * sum(layer.up.weight.square().sum() for layer in self.layers)  # type: ignore[union-attr]
        return loss


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def adapted(penalty: float = 0.0) -> Callable[[], tuple[nn.Module, list[Any]]]:
    def make() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        return Network(penalty), [batch()]

    return make


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def split() -> dict[str, Any]:
    return {"": whalepy.split(2, shares=(3, 1))}


@pytest.mark.parametrize("annotations", [uneven, split])
def test_adapters_train_exactly(workers: Pool, annotations: Callable[[], dict[str, Any]]) -> None:
    compare(workers, Run(adapted(), annotations, 2, clip=(0.01, 2.0), evaluate=True))


def test_a_term_without_rows_counts_once_over_microbatches(workers: Pool) -> None:
    compare(workers, Run(adapted(0.1), uneven, 2, options={"microbatches": 2}))


def test_frozen_parameters_cost_no_gradient_state_or_traffic(workers: Pool) -> None:
    """Bytes of a step under replicate: those of the trainable gradients all-reduced (2 (n - 1) / n of each), and
    a scalar loss."""

    def measure(frozen: bool) -> tuple[int, int, list[str], int]:
        torch.manual_seed(0)
        model = Network()
        if not frozen:
            model.requires_grad_(True)
        model = whalepy.annotate(model, {"": whalepy.replicate(2)})
        parallel = whalepy.compile(model, "2xcpu", batch())
        optimizer = torch.optim.AdamW(parallel.parameters())
        (group,) = parallel._places[0].groups
        before = group.sent_bytes
        parallel.train_step(*parallel.local_batch(batch()))
        sent = group.sent_bytes - before
        optimizer.step()
        trainable = sum(p.nbytes for p in parallel.parameters() if p.requires_grad)
        with_gradient = sorted(name for name, p in parallel.named_parameters() if p.grad is not None)
        return sent, trainable, with_gradient, len(optimizer.state)

    for sent, trainable, with_gradient, states in workers.run(2, measure, True):
        assert trainable == 3 * 2 * RANK * WIDTH * 4
        assert trainable <= sent <= trainable + 16
        assert with_gradient == sorted(f"layers.{i}.{name}.weight" for i in range(3) for name in ("up", "down"))
        assert states == 6
    for sent, trainable, with_gradient, states in workers.run(2, measure, False):
        assert trainable > 9 * 3 * 2 * RANK * WIDTH * 4 * 0.8
        assert trainable <= sent <= trainable + 16
        assert len(with_gradient) == states == 12


# -- checkpointing in the model


class Checkpointed(nn.Module):
    """A call of torch.utils.checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = checkpoint.checkpoint(self.layer, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return F.mse_loss(y, target)


def test_a_checkpoint_is_reported() -> None:
    text = whalepy.plan(whalepy.annotate(Checkpointed(), uneven()), "2xcpu", batch()).explain()
    dropped = "the captured graph does not keep it, and compile(recompute=...) is not there yet"
    assert f"; {dropped}" in text
    assert "torch.utils.checkpoint runs test_frozen.py:" in text


def test_gradient_checkpointing_of_transformers_is_reported_on_every_rank(workers: Pool) -> None:
    def explained() -> str:
        model, (example, *_) = models.gpt2()
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        return whalepy.compile(whalepy.annotate(model, uneven()), "2xcpu", example).explain()

    for text in workers.run(2, explained):
        assert "gradient checkpointing is on in transformer" in text


def test_what_keeps_everything_is_not_reported() -> None:
    text = whalepy.plan(whalepy.annotate(Network(), uneven()), "2xcpu", batch()).explain()
    assert "checkpoint" not in text
