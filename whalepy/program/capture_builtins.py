"""What Python code does otherwise while a model is traced: `len` of a tensor, and checks of values."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

import torch
from torch.distributions import Distribution


@contextlib.contextmanager
def free_lengths() -> Generator[None]:
    """Until it ends, `len(tensor)` is `tensor.shape[0]`: a symbol where that size is one.

    The interpreter makes a plain int of what `__len__` returns, which would fix the size. Elsewhere the same number
    comes out, so that other threads see no difference.
    """
    length = builtins.len

    def free_length(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else length(value)

    with mock.patch.object(builtins, "len", free_length):
        yield


@contextlib.contextmanager
def unchecked_distributions() -> Generator[None]:
    """Until it ends, torch.distributions does not look whether parameters and samples are in their range.

    Those checks raise or do nothing, but branch on values, which a capture has not got.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
