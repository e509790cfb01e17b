"""A cut or a squeeze that does otherwise on a size of one is a condition of the capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.exactness import Run, compare, differences
from tests.pool import Pool
from whalepy.errors import BatchError
from whalepy.program.capture import Captured, capture

WIDTH = 4
Way = Callable[[Tensor], Any]


class Small(nn.Module):
    """Divides by a number that it reads off its input, f32[rows, length, WIDTH]."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).pow(2).sum() / (self.way(x) + 0.5)


def captured(way: Way) -> Captured:
    return capture(Small(way), (torch.randn(6, 5, WIDTH),))


ONE_ROW, ONE_LONG, LARGE = (1, 3, WIDTH), (3, 1, WIDTH), (3, 3, WIDTH)

# what is read, the shapes for which it comes out otherwise than for large ones
WAYS: list[tuple[Way, tuple[tuple[int, ...], ...]]] = [
    (lambda x: len(x[:2]), (ONE_ROW,)),
    (lambda x: len(x[-2:]), (ONE_ROW,)),
    (lambda x: len(x[1:2]), (ONE_ROW,)),
    (lambda x: x[:, :2].shape[1], (ONE_LONG,)),
    (lambda x: x[..., :2, :].shape[1], (ONE_LONG,)),
    (lambda x: x[None, :2].shape[1], (ONE_ROW,)),
    (lambda x: x[:, None, :2].shape[2], (ONE_LONG,)),
    (lambda x: x[x > 0][:2].sum() * 0, ()),  # data tells the size
    (lambda x: len(x[1:]), ()),
    (lambda x: x[:, :, :2].shape[2], ()),  # a fixed size
    (lambda x: x.squeeze().mean(0).numel(), (ONE_ROW, ONE_LONG)),
    (lambda x: x.squeeze(0).shape[0], (ONE_ROW,)),
    (lambda x: torch.squeeze(x, dim=(1,)).shape[1], (ONE_LONG,)),
    (lambda x: x[:, 0].sum(1, keepdim=True).squeeze().sum(0), ()),  # [1] or a scalar: all the same
    (lambda x: x.squeeze(2).shape[2], ()),
    (lambda x: int(len(x) > 1), (ONE_ROW,)),  # the answer as a number
    (lambda x: (x.shape[1] > 1) * 3, (ONE_LONG,)),
]


@pytest.mark.parametrize(("way", "otherwise"), WAYS)
def test_what_a_size_of_one_changes_is_a_condition(way: Way, otherwise: tuple[tuple[int, ...], ...]) -> None:
    program = captured(way)
    for shape in (ONE_ROW, ONE_LONG, LARGE):
        bindings = program.bind([shape])
        told = program.check_sizes(bindings)
        assert program.branches_otherwise(bindings) == (shape in otherwise), shape
        assert (told is not None and "test_capture_small_sizes.py:" in told) == (shape in otherwise), shape


def halves() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=[3, 1])}


def made(way: Way, rows: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return Small(way), [(torch.randn(n, length, WIDTH),) for n, length in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("way", [WAYS[3][0], WAYS[10][0], WAYS[16][0]])
def test_steps_of_length_one_are_those_of_the_local_model(workers: Pool, way: Way) -> None:
    compare(workers, Run(partial(made, way, (6, 5, 4), (5, 1, 3)), halves, 2))


@pytest.mark.parametrize("way", [WAYS[0][0], WAYS[15][0]])
def test_one_row_that_would_come_out_otherwise_is_refused(workers: Pool, way: Way) -> None:
    with pytest.raises(BatchError, match=r"holds only where .*test_capture_small_sizes.py:\d+"):
        differences(workers, Run(partial(made, way, (6, 1), (5, 5)), halves, 2, steps=2))
