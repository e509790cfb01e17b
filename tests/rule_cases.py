"""Operator calls to try rules on: tensors of double precision from the seed that each test sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whalepy.errors import WhaleError
from whalepy.runtime.check_rule import check_call

Row = tuple[Callable[[], tuple[Any, ...]], str | None]
"""A call, and the letters its rule leaves free, in the order of options; None: no rule."""


def call(op: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return op, args, kwargs


def t(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64)


def u(*sizes: int) -> Tensor:
    return torch.rand(sizes, dtype=torch.float64) * 0.8 + 0.1


def grad(x: Tensor) -> Tensor:
    return x.requires_grad_()


def ints(high: int, *sizes: int) -> Tensor:
    return torch.randint(0, high, sizes)


def mask(*sizes: int) -> Tensor:
    return torch.rand(sizes) > 0.5


def positive_definite(*sizes: int) -> Tensor:
    m = t(*sizes)
    return m @ m.mT + 3 * torch.eye(sizes[-1], dtype=torch.float64)


def letters_of(row: Callable[[], tuple[Any, ...]]) -> str | None:
    """The letters of a call's rule, each tried at all shares; None where it has no rule."""
    torch.manual_seed(0)
    op, args, kwargs = row()
    try:
        return " ".join(check_call(op, args, kwargs))
    except WhaleError as error:
        if "has no rule" in error.what:
            return None
        raise


def name_of(value: object) -> str:
    if not callable(value):
        return ""
    operator = value()[0]
    return str(getattr(operator, "__name__", "") if inspect.isfunction(operator) else operator).replace("aten.", "")
