"""Which programs need the rows of the batch in their order, where two replicas hold them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import whalepy
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.arguments import as_arguments
from whalepy.runtime.build import Recipe
from whalepy.runtime.planning import Choices, planned, program_for
from whalepy.runtime.row_order import needs_row_order

ROWS, WIDTH = 6, 4


class Linear(nn.Module):
    """A linear layer, and what becomes of its result."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.inner(x)).sum()


def numbers(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


CASES: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "each row alone": (False, torch.relu),
    "a mean over all rows": (False, lambda x: x - x.mean(0)),  # partial sums are added up: no row has a place
    "rows backwards": (True, lambda x: x * x.flip(0).detach()),
    "sums up to each row": (True, lambda x: x.cumsum(0)),
    "the least of all rows": (True, lambda x: x.sum(1).sort()[0][0]),
    "products of rows with rows": (True, lambda x: (x @ x.T).tril()),
    "rows of equal numbers": (False, lambda x: x * torch.full((x.shape[0], 1), 2.0)),
    "made row by row of equal numbers": (False, lambda x: x * (torch.ones(x.shape[0], 1) * 3 + 1).sqrt()),
    "the number of each row": (True, lambda x: x * numbers(x)[:, None]),
    "made row by row of numbers": (True, lambda x: x * (numbers(x) * 2 + 1)[:, None]),
    "no rows": (False, lambda x: x * torch.arange(WIDTH)),
    "numbers that only index": (False, lambda x: x[numbers(x), x.argmax(1)]),
    "numbers that index and count": (True, lambda x: x[numbers(x), x.argmax(1)] * numbers(x)),
}


def needed(then: Callable[[Tensor], Tensor], *, given_rows: bool = True) -> bool:
    """Of two devices that are given rows of their own, or that each take theirs from all rows."""
    model = Linear(then)
    if given_rows:
        whalepy.annotate(model, {"": whalepy.replicate(2)})
    _, program = program_for(Recipe(model), as_arguments((torch.randn(ROWS, WIDTH),)))
    _, main = planned(program, ClusterSpec.load("2xcpu"), (0, 1), Choices())
    return needs_row_order(main.only.program, main.only.rewritten)


@pytest.mark.parametrize(("wanted", "then"), CASES.values(), ids=CASES)
def test_what_needs_rows_in_their_order(wanted: bool, then: Callable[[Tensor], Tensor]) -> None:
    assert needed(then) is wanted


def test_devices_that_take_their_rows_from_all_need_the_order() -> None:
    """Without a replicate scope of the user's."""
    assert needed(torch.relu, given_rows=False)
