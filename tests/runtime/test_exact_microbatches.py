"""Microbatches give the loss and the gradients of the whole batch: denominators are counted over it in a prologue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import whalepy
from tests import models
from tests.exactness import Run, compare
from tests.pool import Pool

THREE = {"microbatches": 3}


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def three() -> dict[str, Any]:
    return {"": whalepy.replicate(3, shares=(5, 2, 1))}


def split_blocks() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(3, 1))}


def nested() -> dict[str, Any]:
    return {"": [whalepy.replicate(2), whalepy.split(2, shares=(3, 1))]}


def head() -> dict[str, Any]:
    return {"transformer": whalepy.replicate(2), "lm_head": whalepy.split(2, shares=(3, 1))}


def ignored(make: Callable[[list[Any]], models.Made] = models.gpt2, rows: int = 6) -> Callable[[], models.Made]:
    """Labels are -100 unevenly over ranks and over microbatches."""
    return lambda: make(models.language_batches([(8, 12)], ignored=rows))


def changing_rows() -> models.Made:
    """Ranks that get fewer rows than there are microbatches, or none."""
    return models.gpt2(models.language_batches([(8, 12), (5, 9), (1, 12)]))


def own() -> models.Made:
    return models.residual((8, 8, 3))


RUNS: dict[str, Run] = {
    "replicate": Run(ignored(), uneven, 2, options=THREE),
    "split of blocks": Run(ignored(), split_blocks, 2, options=THREE),
    "head split by classes": Run(ignored(), head, 2, options=THREE),
    "rows that change": Run(changing_rows, three, 3, options=THREE),
    "own model": Run(own, uneven, 2, loss_fn=models.classes_loss, evaluate=True, options=THREE),
}
MORE: dict[str, Run] = {
    "bert, replicate": Run(ignored(models.bert), three, 3, dtype=torch.float32, options=THREE),
    "replicate > split": Run(ignored(), nested, 4, spec="2xcpu + 2xcpu*0.5", options=THREE),
    "accumulation": Run(ignored(rows=2), uneven, 2, accumulate=2, options=THREE),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_microbatches(workers: Pool, run: Run) -> None:
    compare(workers, run)


@pytest.mark.slow
@pytest.mark.parametrize("run", MORE.values(), ids=MORE)
def test_more_microbatches(workers: Pool, run: Run) -> None:
    compare(workers, run)


class Averaged(torch.nn.Module):
    """A mean over rows is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 2)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.down(torch.tanh(self.up(x))), target)


def averaged() -> models.Made:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    return Averaged(), [(torch.randn(n, 6, generator=draw), torch.randn(n, 2, generator=draw)) for n in (6, 7)]


@pytest.mark.parametrize("scopes", [{"": whalepy.split(2)}, {"up": whalepy.split(2, shares=(3, 1))}, {}], ids=str)
def test_a_mean_counts_the_rows_of_the_step_where_no_level_cuts_rows(workers: Pool, scopes: Any) -> None:
    compare(workers, Run(averaged, lambda: scopes, 2 if scopes else 1, options=THREE))


def running_mean(count: int) -> torch.Tensor:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=1.0), torch.nn.Linear(3, 4))
    rows = torch.arange(18.0).view(6, 3)
    scopes = {"1": whalepy.split(2)}
    parallel = whalepy.compile(
        whalepy.annotate(model, scopes), "2xcpu", (rows, rows[:, :1].long() % 4), loss_fn=row_loss, microbatches=count
    )
    parallel.train_step(*parallel.local_batch((rows, rows[:, :1].long() % 4)))
    return parallel.full_state_dict()["0.running_mean"]


def row_loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, target.squeeze(1))


def test_statistics_of_microbatches_are_averaged_where_no_level_cuts_rows(workers: Pool) -> None:
    one, three = (workers.run(2, running_mean, count)[0] for count in (1, 3))
    assert torch.allclose(one, three)
