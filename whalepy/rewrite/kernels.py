"""Local kernels that stand in for an operator when one of its factors is sharded: plain torch, no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from whalepy.program.functional_ops import batch_norm


class Reduce(Protocol):
    """All-reduces over one level; new tensors, the same bits on every device."""

    def sum(self, x: torch.Tensor) -> torch.Tensor: ...
    def max(self, x: torch.Tensor) -> torch.Tensor: ...


def bridge(x: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The value in another layout; its gradient takes the way back."""
    return move(x)


def retype(x: torch.Tensor, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same value under another type: the forward moves nothing, the gradient may."""
    return move(x)


def start_bridge(x: torch.Tensor, move: Any) -> Any:
    """A bridge on its way, or a retype, of which that holds backward."""
    return move.start(x)


def finish_bridge(started: Any, move: Any) -> torch.Tensor:
    """The value that a started bridge gives."""
    return move.finish(started)


def masked_embedding(weight: torch.Tensor, indices: torch.Tensor, start: int, padding_idx: int = -1) -> torch.Tensor:
    """Rows of a vocabulary shard that begins at `start`; zero for indices that other devices hold (a partial sum)."""
    rows = weight.shape[0]
    if rows == 0:
        return weight.new_zeros((*indices.shape, *weight.shape[1:])) + weight.sum()
    local = indices - start
    outside = (local < 0) | (local >= rows)
    local_padding = padding_idx - start
    padding = local_padding if padding_idx >= 0 and 0 <= local_padding < rows else None
    looked_up = F.embedding(local.masked_fill(outside, 0), weight)
    if padding is not None:  # the padding row takes no gradient
        is_padding = (indices == padding_idx).unsqueeze(-1)
        looked_up = torch.where(is_padding, looked_up.detach(), looked_up)
    return looked_up.masked_fill(outside.unsqueeze(-1), 0)


def masked_bags(table: torch.Tensor, rows: torch.Tensor, mean: bool, start: int) -> torch.Tensor:
    """Bags of the rows of a table's shard that begins at `start`, without those of other devices (a partial sum)."""
    held = table.shape[0]
    if held == 0:
        return table.new_zeros((rows.shape[0], table.shape[1])) + table.sum()
    local = rows - start
    here = (local >= 0) & (local < held)
    weights = here.to(table.dtype) / rows.shape[1] if mean else here.to(table.dtype)
    return F.embedding_bag(local.masked_fill(~here, 0), table, per_sample_weights=weights, mode="sum")


def local_index(x: torch.Tensor, indices: Sequence[torch.Tensor | None], starts: Sequence[int | None]) -> torch.Tensor:
    """`x[indices]` where indices with a start count from the first element of this device's shard."""
    shifted = [i if i is None or start is None else i - start for i, start in zip(indices, starts, strict=True)]
    return torch.ops.aten.index.Tensor(x, shifted)


def global_mean(
    x: torch.Tensor, dims: Sequence[int], keepdim: bool, count: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """This device's part of a mean: its sum over the global count (a partial sum)."""
    total = x.sum(dtype=dtype) if not dims else x.sum(dim=list(dims), keepdim=keepdim, dtype=dtype)
    return total / count


@dataclass(frozen=True)
class Seeded:
    """A random operator drawn from its own stream; the default generators are left as they were."""

    op: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return _name_of("seeded", self.op)

    def __call__(self, stream: int, *args: Any, **kwargs: Any) -> Any:
        cuda = [a.device for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(stream)
            return self.op(*args, **kwargs)


@dataclass(frozen=True)
class Guarded:
    """An operator, or zeros of its results' shapes where an operand is empty: many torch kernels fail on those."""

    op: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    """Of the results."""

    @property
    def __name__(self) -> str:
        return _name_of("guarded", self.op)

    def __call__(self, shapes: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if all(tensor.numel() for tensor in tensors):
            return self.op(*args, **kwargs)
        made = [tensors[0].new_zeros(list(s), dtype=dtype) for s, dtype in zip(shapes, self.dtypes, strict=True)]
        return made[0] if len(made) == 1 else tuple(made)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
    """Attention, or zeros where this device has no rows or heads: torch 2.11 divides by their number."""
    if query.numel() and key.numel():
        return torch.ops.aten.scaled_dot_product_attention.default(query, key, value, *args, **kw)
    return query.new_zeros((*query.shape[:-1], value.shape[-1]))


def _name_of(kind: str, op: Callable[..., Any]) -> str:
    return f"{kind}_{getattr(op, '__name__', 'op').replace('.', '_')}"


@dataclass(frozen=True)
class Convolution:
    """A convolution of this device's channels. Without channels it is the bias alone, in the shape of the result."""

    op: Callable[..., torch.Tensor]
    groups_at: int | None
    """Which argument after the bias is the number of groups, to be replaced by this device's; None for one group."""

    @property
    def __name__(self) -> str:
        return _name_of("local", self.op)

    def __call__(
        self, shape: Sequence[int], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> torch.Tensor:
        if x.numel() and weight.numel():
            return self.op(x, weight, bias, *self._local(x, weight, rest))
        empty = x.new_zeros(list(shape))
        return empty if bias is None else empty + bias.view(-1, *[1] * (weight.ndim - 2))

    def _local(self, x: torch.Tensor, weight: torch.Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.groups_at is None:
            return rest
        groups = x.shape[x.ndim - weight.ndim + 1] // weight.shape[1]
        return (*rest[: self.groups_at], groups, *rest[self.groups_at + 1 :])


def class_parallel(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, start: int, reduce: Reduce
) -> torch.Tensor:
    """Summed cross entropy of logits f[rows, classes of this device]; the whole sum on every device."""
    return _ClassParallelCrossEntropy.apply(logits, target, ignore_index, start, reduce)


class _ClassParallelCrossEntropy(torch.autograd.Function):
    """Two small all-reduces instead of gathering the logits (as Megatron-LM's vocabulary-parallel loss, in three).

    What is as large as the logits is passed over as seldom as can be, and its backward pass can be run once.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, start: int, reduce: Reduce
    ) -> torch.Tensor:
        rows, classes = logits.shape
        wide = logits if logits.dtype == torch.float64 else logits.float()
        least = wide.new_full((rows,), float("-inf"))
        peak = reduce.max(wide.amax(dim=1) if classes else least)
        shifted = wide - peak.unsqueeze(1)
        local = target - start
        here = (local >= 0) & (local < classes)
        index = local.masked_fill(~here, 0).unsqueeze(1)
        picked = shifted.gather(1, index).squeeze(1) if classes else least.zero_()
        exponentials = shifted.exp_()
        total, picked = reduce.sum(torch.stack((exponentials.sum(dim=1), picked.masked_fill(~here, 0)))).unbind()
        counted = target != ignore_index
        losses = (total.log() - picked).masked_fill(~counted, 0)
        ctx.save_for_backward(exponentials, total, index, here, counted)
        ctx.dtype = logits.dtype
        return losses.sum().to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        exponentials, total, index, here, counted = ctx.saved_tensors
        per_row = counted * gradients[0].to(total.dtype)
        gradient = exponentials.mul_((per_row / total).unsqueeze(1))  # torch refuses a second backward pass
        if gradient.shape[1]:
            gradient.scatter_add_(1, index, -(here * per_row).unsqueeze(1))
        return gradient.to(ctx.dtype), None, None, None, None


def batch_statistics(x: torch.Tensor, rows: int, total: int, *rest: Any) -> tuple[torch.Tensor, ...]:
    """Batch norm by this device's rows; new running statistics weighted by its share of the rows (partial sums)."""
    if x.shape[0] == 0:
        weight = rest[0]
        y = x if weight is None else x * weight.view(1, -1, *[1] * (x.ndim - 2))
        return y, *(statistic.new_zeros(statistic.shape) for statistic in rest[2:4])
    y, *statistics = batch_norm(x, *rest)
    return y, *(statistic * (rows / total) for statistic in statistics)
