"""Operators made of products that reach other rates than these: convolutions and fused attention, and their backward.

The branches for CUDA are written after its documentation and have not run yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Call = Callable[[], object]

# Both ends of a pyramid: channels and the side of the image; the FLOPs of a row are about the same.
_IMAGES = ((64, 32), (512, 4))
_WINDOWS = (1, 3)
# Of attention: heads, tokens of a row, and the width of a head.
_HEADS, _TOKENS, _WIDTH = 8, 256, 64


@dataclass(frozen=True)
class Kind:
    """One kind of operator."""

    flops: Callable[[int], float]
    """Of one call, the mean over the shapes, by rows of the batch."""
    calls: Callable[[int, torch.dtype, torch.device], list[Call]]
    """One per shape."""


def _convolution_flops(rows: int) -> float:
    sizes = [2.0 * rows * side**2 * channels**2 * window**2 for channels, side in _IMAGES for window in _WINDOWS]
    return statistics.mean(sizes)


def _convolutions(rows: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    return [
        lambda x=x, w=weight: F.conv2d(x, w, padding=w.shape[-1] // 2) for x, weight in _images(rows, dtype, device)
    ]


def _convolutions_backward(rows: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    return [_convolution_backward(x, weight) for x, weight in _images(rows, dtype, device)]


def _convolution_backward(x: torch.Tensor, weight: torch.Tensor) -> Call:
    around = [weight.shape[-1] // 2] * 2
    gradient = torch.rand_like(x)  # the padding keeps the shape
    return lambda: torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], around, [1, 1], False, [0, 0], 1, [True, True, False]
    )


def _images(rows: int, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and weights."""

    def made(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device).to(dtype)

    return [
        (made(rows, channels, side, side), made(channels, channels, window, window))
        for channels, side in _IMAGES
        for window in _WINDOWS
    ]


def _attention_flops(rows: int) -> float:
    return 4.0 * rows * _HEADS * _TOKENS**2 * _WIDTH


def _attention(rows: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    query, key, value = _tokens(rows, dtype, device)
    return [lambda: F.scaled_dot_product_attention(query, key, value)]


def _attention_backward(rows: int, dtype: torch.dtype, device: torch.device) -> list[Call]:
    given = query, key, value = [x.requires_grad_() for x in _tokens(rows, dtype, device)]
    result = F.scaled_dot_product_attention(query, key, value)
    gradient = torch.rand_like(result)
    return [lambda: torch.autograd.grad(result, given, gradient, retain_graph=True)]


def _tokens(rows: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.rand(rows, _HEADS, _TOKENS, _WIDTH, device=device).to(dtype) for _ in range(3)]


KINDS: Mapping[str, Kind] = {
    "convolution": Kind(_convolution_flops, _convolutions),
    "convolution backward": Kind(lambda rows: 2 * _convolution_flops(rows), _convolutions_backward),
    "attention": Kind(_attention_flops, _attention),
    "attention backward": Kind(lambda rows: 2.5 * _attention_flops(rows), _attention_backward),
}
"""The backward of a convolution is two products of the same FLOPs; that of attention five, where forward has two."""
