"""Checks of values are left out of the capture, which says so; a branch that goes on either way is refused.

PYTEST_DONT_REWRITE: the asserts in here are those of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.program.test_functionalise import check_against_eager
from whalepy.errors import CaptureError
from whalepy.program.capture import capture

WIDTH = 4


class Checking(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).square().mean()


def asserted(m: Any, x: Tensor) -> Tensor:
    assert torch.all(x < 100).item(), "too large"
    return m.linear(x)


def asserted_tensor(m: Any, x: Tensor) -> Tensor:
    assert not (x > 100).any(), f"too large: {x}"
    return m.linear(x)


def asserted_twice(m: Any, x: Tensor) -> Tensor:
    assert x.isnan().sum() == 0 and x.isinf().sum() == 0, "not finite"
    return m.linear(x)


def raised(m: Any, x: Tensor) -> Tensor:
    if x.max().item() > 100:
        raise ValueError(f"larger than {100}")
    return m.linear(x)


def raised_otherwise(m: Any, x: Tensor) -> Tensor:
    if (x < 100).all():
        h = m.linear(x)
    else:
        raise ValueError("too large")
    return h


def within_a_handler_of_others(m: Any, x: Tensor) -> Tensor:
    try:
        asserted(m, x)
    except KeyError:
        x = x * 2
    return m.linear(x)


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = asserted(m, x)
    return x


def line(function: Callable[..., Any], offset: int) -> str:
    return f"test_capture_checks.py:{inspect.getsourcelines(function)[1] + offset}"


CHECKS = [
    (asserted, line(asserted, 1)),
    (asserted_tensor, line(asserted_tensor, 1)),
    (asserted_twice, line(asserted_twice, 1)),
    (raised, line(raised, 1)),
    (raised_otherwise, line(raised_otherwise, 1)),
    (within_a_handler_of_others, line(asserted, 1)),
    (in_a_loop, line(asserted, 1)),
]


@pytest.mark.parametrize(("body", "place"), CHECKS)
def test_a_check_is_left_out(body: Any, place: str) -> None:
    model = Checking(body)
    captured = capture(model, (torch.randn(6, WIDTH),))
    assert captured.warnings == (
        f"{place} raises an error for some values in tensors: the captured graph does not look",
    )
    check_against_eager(model, captured, torch.randn(3, WIDTH))


def goes_on(m: Any, x: Tensor) -> Tensor:
    if x.max() > 100:
        x = x / 100
    return m.linear(x)


def caught(m: Any, x: Tensor) -> Tensor:
    try:
        assert x.max() < 100
    except AssertionError:
        x = x / 100
    return m.linear(x)


def caught_by_the_caller(m: Any, x: Tensor) -> Tensor:
    try:
        return asserted(m, x)
    except Exception:
        return m.linear(x / 100)


def caught_once(m: Any, x: Tensor) -> Tensor:
    """The same check twice, of which one is caught."""
    asserted(m, x)
    return caught_by_the_caller(m, x)


def raises_sometimes(m: Any, x: Tensor) -> Tensor:
    if x.max() > 100:
        if x.shape[1] > 100:
            raise ValueError("too large")
        x = x / 100
    return m.linear(x)


def repeated(m: Any, x: Tensor) -> Tensor:
    while x.max() > 100:
        x = x / 2
    return m.linear(x)


def counted(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * (2.0 if bool(x.max() > 100) else 1.0)


def number_or_default(m: Any, x: Tensor) -> Tensor:
    """No error of the capture is taken for one of the model."""
    try:
        scale = float(x.max())
    except Exception:
        scale = 1.0
    return m.linear(x) * scale


BRANCHES = [
    (goes_on, line(goes_on, 1)),
    (caught, line(caught, 2)),
    (caught_by_the_caller, line(asserted, 1)),
    (caught_once, line(asserted, 1)),
    (raises_sometimes, line(raises_sometimes, 1)),
    (repeated, line(repeated, 1)),
    (counted, line(counted, 1)),
    (number_or_default, line(number_or_default, 3)),
]


@pytest.mark.parametrize(("body", "place"), BRANCHES)
def test_a_branch_is_refused(body: Any, place: str) -> None:
    with pytest.raises(CaptureError) as refused:
        capture(Checking(body), (torch.randn(6, WIDTH),))
    assert str(refused.value) == (
        "the model takes a branch, or a size, that depends on the values in a tensor\n"
        f"  at:  {place}\n"
        "  fix: use torch.where or torch.cond; or give capture=False and loss_weight= to train the model whole,"
        " under one replicate level"
    )


def test_the_model_still_checks_afterwards() -> None:
    model = Checking(raised)
    capture(model, (torch.randn(6, WIDTH),))
    with pytest.raises(ValueError, match="larger than 100"):
        model(torch.full((6, WIDTH), 101.0))


def test_on_meta() -> None:
    captured = capture(Checking(asserted_twice).to("meta"), (torch.empty(6, WIDTH, device="meta"),))
    assert len(captured.warnings) == 1
