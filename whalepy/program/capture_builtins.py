"""What Python code does otherwise while a model is traced: `len` of a tensor, checks of values, casts of modules."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

import torch
from torch import nn
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


@contextlib.contextmanager
def masks_as_given() -> Generator[None]:
    """Until it ends, `nn.TransformerEncoder` and `nn.TransformerDecoder` take a mask for causal only where told so.

    They compare it with a causal one to choose a faster kernel, which is a branch on values; the result is the same.
    """

    def causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with mock.patch.object(torch.nn.modules.transformer, "_detect_is_causal_mask", causal):
        yield


@contextlib.contextmanager
def modules_in_place() -> Generator[None]:
    """Until it ends, `module.to(dtype)` that changes nothing leaves the module alone: export cannot swap parameters."""
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        tensors = [*module.parameters(), *module.buffers()]
        moved = device is not None and any(tensor.device != device for tensor in tensors)
        cast = dtype is not None and any(t.dtype != dtype for t in tensors if t.is_floating_point() or t.is_complex())
        return move(module, *args, **kwargs) if moved or cast else module

    with mock.patch.object(nn.Module, "to", to):
        yield
