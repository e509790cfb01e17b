"""Buffers that the forward writes: statistics by rank or over all rows, averages, counts, those that are not saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.errors import CaptureError, PlanError

ROWS, WIDTH = 8, 6


def uneven() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def split() -> dict[str, Any]:
    return {"": whalepy.split(2, shares=(2, 1))}


def batches(sizes: tuple[int, ...] = (ROWS, ROWS)) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(n, WIDTH) * 3 + 1, torch.randn(n, WIDTH)) for n in sizes]


def normed(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, **options), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def squared(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


# -- local statistics


@pytest.mark.parametrize(
    ("options", "parts", "microbatches"),
    [
        ({}, [(6, 2), (6, 2)], 1),
        ({}, [(6, 2), (8, 2)], 1),  # other rows in the second step
        ({"affine": False}, [(6, 2)], 1),
        ({}, [(6, 6, 2, 2), (6, 6, 2, 2)], 2),  # microbatches: each has statistics of its own
    ],
)
def test_statistics_are_each_rank_s_own(
    workers: Pool, options: dict[str, Any], parts: list[tuple[int, ...]], microbatches: int
) -> None:
    """The reference: each part of the rows through the local model; all it gives is averaged by rows."""

    def run() -> list[str]:
        model = normed(**options).double()
        local = copy.deepcopy(model)
        given = [(x.double(), y.double()) for x, y in batches(tuple(map(sum, parts)))]
        whalepy.annotate(model, uneven())
        parallel = whalepy.compile(model, "2xcpu", given[0], loss_fn=squared, microbatches=microbatches)
        wrong: list[str] = []

        def check(what: str, found: Tensor, expected: Tensor) -> None:
            if not torch.allclose(found, expected.to(found.dtype), rtol=1e-9, atol=1e-12):
                wrong.append(f"{what}: {found}, expected {expected}")

        for (x, y), lengths in zip(given, parts, strict=True):
            local.zero_grad()
            parallel.zero_grad()
            before = copy.deepcopy(dict(local.named_buffers()))
            after: dict[str, Tensor] = {name: torch.zeros_like(b) for name, b in before.items()}
            total = torch.zeros((), dtype=torch.float64)
            for rows in torch.arange(len(x)).split(lengths):
                for name, buffer in local.named_buffers():
                    buffer.copy_(before[name])
                share = len(x[rows]) / len(x)
                loss = squared(local(x[rows]), y[rows]) * share
                loss.backward()
                total += loss.detach()
                for name, buffer in local.named_buffers():
                    after[name] = after[name] + buffer * share
            for name, buffer in local.named_buffers():
                buffer.copy_(after[name].round() if not buffer.is_floating_point() else after[name])
            check("loss", parallel.train_step(*parallel.local_batch((x, y))), total)
            gradients = parallel.full_gradients()
            for name, parameter in local.named_parameters():
                check(f"gradient of {name}", gradients[name], parameter.grad)  # type: ignore[arg-type]
            state = parallel.full_state_dict()
            for name, buffer in local.named_buffers():
                check(name, state[name], buffer)
        x, y = given[0]
        local.eval()
        check("evaluation", parallel.eval_step(*parallel.local_batch((x, y))), squared(local(x), y))
        return wrong

    assert workers.run(2, run) == [[], []]


# -- statistics over all rows


def made(kind: Callable[[], nn.Module], sizes: tuple[int, ...] = (ROWS, 5)) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        return kind(), batches(sizes)

    return make


SYNC = {"sync_batchnorm": True}


@pytest.mark.parametrize(
    ("options", "annotations"),
    [
        ({}, uneven),
        ({}, lambda: {"0": whalepy.replicate(2, shares=(3, 1)), "1": whalepy.replicate(2, shares=(3, 1))}),
        ({"track_running_stats": False}, uneven),
    ],
)
def test_synchronised_statistics_are_the_local_model_s(
    workers: Pool, options: dict[str, Any], annotations: Callable[[], dict[str, Any]]
) -> None:
    kind = lambda: normed(**options)  # noqa: E731
    run = Run(made(kind), annotations, 2, loss_fn=squared, evaluate=True, output=lambda y: y, options=SYNC)
    compare(workers, run)


def test_a_norm_that_keeps_no_statistics_takes_them_over_all_rows(workers: Pool) -> None:
    """Nothing is averaged over steps that could make up for the statistics of a few rows."""
    kind = lambda: normed(track_running_stats=False)  # noqa: E731
    compare(workers, Run(made(kind), uneven, 2, loss_fn=squared, evaluate=True, output=lambda y: y))


def test_channels_split_over_ranks_have_their_whole_statistics(workers: Pool) -> None:
    compare(workers, Run(made(normed), split, 2, loss_fn=squared, evaluate=True, output=lambda y: y))


class Image(nn.Module):
    """Statistics of channels over rows and pixels, and of what a ReLU leaves of them."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image = x.unsqueeze(1).unsqueeze(1) * x.unsqueeze(1).unsqueeze(-1)
        return self.head(self.norm(self.grow(image)).relu().mean((2, 3)))


@pytest.mark.parametrize("options", [SYNC, pytest.param({}, id="split")])
def test_images(workers: Pool, options: dict[str, Any]) -> None:
    compare(workers, Run(made(Image), uneven if options else split, 2, loss_fn=squared, options=options))


def test_microbatches_of_synchronised_statistics_are_refused(workers: Pool) -> None:
    """Statistics of a whole batch are no sum over its parts."""

    def message() -> str:
        model = whalepy.annotate(normed(), uneven())
        with pytest.raises(PlanError) as caught:
            whalepy.compile(model, "2xcpu", batches()[0], loss_fn=squared, microbatches=2, **SYNC)
        return caught.value.what

    expected = (
        "the loss is not a sum over rows: whalepy.program.functional_ops.batch_norm needs all rows at once,"
        " so microbatches would change it"
    )
    assert workers.run(2, message) == [expected] * 2


def test_a_cumulative_average_is_refused() -> None:
    """Its factor is a python number of the count of batches."""
    with pytest.raises(CaptureError) as caught:
        whalepy.compile(normed(momentum=None), "1xcpu", batches()[0], loss_fn=squared)
    assert caught.value.what == "the model takes a branch, or a size, that depends on the values in a tensor"


# -- buffers of one's own


class Averaged(nn.Module):
    """A moving average of rows that the loss reads, a count of steps, a table that is not saved."""

    average: Tensor
    steps: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
            self.steps.add_(1)
        return (y - self.average) * self.table


@pytest.mark.parametrize(
    ("annotations", "options"),
    [(uneven, {}), (split, {}), (lambda: {"": [whalepy.replicate(1), whalepy.split(2)]}, {})],
)
def test_an_average_that_the_forward_keeps(
    workers: Pool, annotations: Callable[[], dict[str, Any]], options: dict[str, Any]
) -> None:
    run = Run(made(Averaged), annotations, 2, loss_fn=squared, evaluate=True, output=lambda y: y, options=options)
    compare(workers, run)


class Counted(nn.Module):
    """Buffers that the rest of the step does not read: microbatches keep them exact."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.seen.copy_(0.9 * self.seen + 0.1 * y.detach().mean(0))
        return y


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_an_average_under_microbatches(workers: Pool, microbatches: int) -> None:
    options = {"microbatches": microbatches}
    compare(workers, Run(made(Counted), uneven, 2, loss_fn=squared, evaluate=True, options=options))


def test_buffers_that_are_not_saved(workers: Pool) -> None:
    def run() -> tuple[list[str], list[str]]:
        parallel = whalepy.compile(whalepy.annotate(Averaged(), uneven()), "2xcpu", batches()[0], loss_fn=squared)
        return sorted(parallel.full_state_dict()), sorted(name for name, _ in parallel.named_buffers())

    saved = ["average", "layer.bias", "layer.weight", "steps"]
    assert workers.run(2, run) == [(saved, ["average", "steps", "table"])] * 2
