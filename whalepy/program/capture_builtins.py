"""`len` of a tensor as a free size, while a model is traced."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

import torch


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
