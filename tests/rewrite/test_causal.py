"""A mask that only hides later keys is left to the kernel; any other mask stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whalepy

Mask = Callable[[Tensor, int, int], Tensor]


def no_later_key(x: Tensor, q: int, k: int) -> Tensor:
    return torch.arange(k)[None, :] <= torch.arange(q)[:, None]


def no_earlier_query(x: Tensor, q: int, k: int) -> Tensor:
    return (torch.arange(q)[:, None] >= torch.arange(k)[None, :])[None, None].expand(x.shape[0], 1, q, k)


def earlier_keys_only(x: Tensor, q: int, k: int) -> Tensor:
    return torch.arange(k)[None, :] < torch.arange(q)[:, None] + 1


def later_keys_only(x: Tensor, q: int, k: int) -> Tensor:
    return torch.arange(k)[None, :] >= torch.arange(q)[:, None]


def one_further(x: Tensor, q: int, k: int) -> Tensor:
    return torch.arange(k)[None, :] <= torch.arange(1, q + 1)[:, None]


def with_padding(x: Tensor, q: int, k: int) -> Tensor:
    return no_later_key(x, q, k) & (x[:, None, None, :, 0] > -9)


def transposed(x: Tensor, q: int, k: int) -> Tensor:
    return (torch.arange(k)[None, :] >= torch.arange(q)[:, None]).transpose(0, 1)


class Attention(nn.Module):
    def __init__(self, mask: Mask, keys: int | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.mask, self.keys = mask, keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.keys is not None:
            k, v = k[:, :, : self.keys], v[:, :, : self.keys]
        mask = self.mask(x, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask).pow(2).mean()


CASES = [
    (no_later_key, None, True),
    (no_earlier_query, None, True),  # the same, written from the queries and spread over rows
    (earlier_keys_only, None, False),  # the same, but a position is computed with: not known to count from 0
    (later_keys_only, None, False),
    (one_further, None, False),
    (with_padding, None, False),
    (transposed, None, False),
    (no_later_key, 3, False),  # fewer keys than queries
]


@pytest.mark.parametrize(("mask", "keys", "causal"), CASES)
def test_only_a_causal_mask_is_left_out(mask: Mask, keys: int | None, causal: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(mask, keys).double(), torch.randn(4, 6, 8, dtype=torch.float64)
    whalepy.annotate(model, {"": whalepy.replicate(1)})
    parallel = whalepy.compile(model, "1xcpu", (x,))
    assert ("is_causal=True" in str(parallel.program(0))) is causal
    loss = parallel.train_step(x)
    local = model(x)
    local.backward()
    torch.testing.assert_close(loss, local.detach(), rtol=1e-12, atol=0)
    for name, gradient in parallel.full_gradients().items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


def test_queries_that_are_cut_keep_their_mask() -> None:
    """A device that has later queries only would take them for the first ones."""
    model = Attention(no_later_key)
    whalepy.annotate(model, {"": whalepy.split(2)})
    text = str(whalepy.plan(model, "2xcpu", (torch.randn(4, 6, 8),)).program(0))
    line = next(line for line in text.splitlines() if "attention" in line and "whalepy." in line)
    cut_by_position = "S(2.0)" in line
    assert ("is_causal=True" in line) is not cut_by_position
