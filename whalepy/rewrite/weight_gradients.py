"""Gradients of operators that have a weight, one operand at a time; the formulas are torch's own, for the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from whalepy.rewrite import kernels

aten = torch.ops.aten


class Form(Protocol):
    """Where an operator takes its input, weight and bias, and their gradients from that of its result.

    `rest` are the arguments of the call with None for every tensor.
    """

    @property
    def x(self) -> int: ...
    @property
    def weight(self) -> int: ...
    @property
    def bias(self) -> int | None: ...
    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor: ...
    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]: ...
    def of_bias(self, gradient: Tensor, bias: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Product:
    """x @ weight + bias, x of any number of dims; or x @ weight.t() + bias."""

    x: int
    weight: int
    bias: int | None = None
    transposed: bool = False

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor:
        """gradient @ weight.t(), in the order in memory of the input."""
        g, w = _rows(gradient), self._matrix(weight)
        if _by_columns(_rows(x)):
            return w.conj().mm(g.t()).t().reshape(x.shape)
        return g.mm(w.t().conj()).reshape(x.shape)

    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]:
        """x.t() @ gradient, in the order in memory of the weight."""
        g, rows = _rows(gradient), _rows(x)
        found = g.t().mm(rows.conj()).t() if _by_columns(self._matrix(weight)) else rows.t().conj().mm(g)
        return [self._matrix(found), *([] if bias is None else [self.of_bias(gradient, bias)])]

    def of_bias(self, gradient: Tensor, bias: Tensor) -> Tensor:
        """The gradient summed over what the bias was repeated for."""
        return gradient.sum_to_size(bias.shape)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class BatchProduct:
    """bmm(x, weight): a matrix for each member of the batch."""

    x: int = 0
    weight: int = 1
    bias: None = None

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor:
        """gradient @ weight transposed."""
        return gradient.bmm(weight.transpose(1, 2).conj())

    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]:
        """x transposed @ gradient."""
        return [x.transpose(1, 2).conj().bmm(gradient)]

    def of_bias(self, gradient: Tensor, bias: Tensor) -> Tensor:
        """There is no bias."""
        raise NotImplementedError


@dataclass(frozen=True)
class Convolved:
    """A convolution, alone or as a device's own channels; its input has a batch."""

    names: tuple[str, ...]
    """Of the arguments after the bias, in order."""
    transposed: bool = False
    local: kernels.Convolution | None = None
    """What gives the groups of this device."""

    @property
    def x(self) -> int:
        """A local convolution takes the shape of its result first."""
        return 0 if self.local is None else 1

    @property
    def weight(self) -> int:
        """After the input."""
        return self.x + 1

    @property
    def bias(self) -> int:
        """After the weight."""
        return self.x + 2

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor:
        """By the kernel that torch's backward pass runs."""
        return self._backward(gradient, x, weight, None, rest, [True, False, False])[0]

    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]:
        """By the kernel that torch's backward pass runs; on some devices one kernel gives both."""
        sizes = None if bias is None else list(bias.shape)
        found = self._backward(gradient, x, weight, sizes, rest, [False, True, bias is not None])
        return list(found[1:] if bias is not None else found[1:2])

    def of_bias(self, gradient: Tensor, bias: Tensor) -> Tensor:
        """The gradient summed over rows and places."""
        return gradient.sum([0, *range(2, gradient.ndim)])

    def given(self, after: Sequence[Any]) -> dict[str, Any]:
        """The arguments after the bias, by name."""
        return dict(zip(self.names, after, strict=False))

    def _backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        bias_sizes: list[int] | None,
        rest: Sequence[Any],
        mask: list[bool],
    ) -> Any:
        after = tuple(rest[self.bias + 1 :])
        given = self.given(after if self.local is None else self.local._local(x, weight, after))
        dims = weight.ndim - 2
        stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
        padding = _padding(given.get("padding", 0), weight, dilation)
        output_padding = _each(given.get("output_padding", 0), dims)
        transposed = given.get("transposed", self.transposed)
        options = (stride, padding, dilation, transposed, output_padding, given.get("groups", 1))
        return aten.convolution_backward.default(gradient, x, weight, bias_sizes, *options, mask)


@dataclass(frozen=True)
class Looked:
    """embedding(weight, indices, padding_idx, scale_grad_by_freq)."""

    x: int = 1
    weight: int = 0
    bias: None = None

    def of_input(self, gradient: Tensor, x: Tensor, weight: Tensor, rest: Sequence[Any]) -> Tensor:
        """Indices have no gradient."""
        raise NotImplementedError

    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]:
        """Rows of the gradient summed by index."""
        padding, scaled = (*rest[2:4], *(-1, False)[len(rest[2:4]) :])
        return [aten.embedding_dense_backward.default(gradient, x, weight.shape[0], padding, scaled)]

    def of_bias(self, gradient: Tensor, bias: Tensor) -> Tensor:
        """There is no bias."""
        raise NotImplementedError


@dataclass(frozen=True)
class LookedInShard(Looked):
    """masked_embedding(weight, indices, start, padding_idx)."""

    def of_weights(
        self, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Sequence[Any]
    ) -> list[Tensor]:
        """As of an embedding, of the indices in this shard alone."""
        start, padding = (*rest[2:], -1)[:2]
        local = x - start
        without = (local < 0) | (local >= weight.shape[0])
        none = without | (x == padding) if padding >= 0 else without
        kept = gradient.masked_fill(none.unsqueeze(-1), 0)
        indices = local.masked_fill(without, 0)
        return [aten.embedding_dense_backward.default(kept, indices, weight.shape[0], -1, False)]


def pads_evenly(weight: Tensor, dilation: Any) -> bool:
    """Whether padding="same" pads every dim alike at its beginning and end."""
    return all(d * (k - 1) % 2 == 0 for d, k in zip(_each(dilation, weight.ndim - 2), weight.shape[2:], strict=True))


def _padding(given: Any, weight: Tensor, dilation: Sequence[int]) -> list[int]:
    if given == "same":
        return [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return _each(0 if given == "valid" else given, weight.ndim - 2)


def _each(given: Any, dims: int) -> list[int]:
    listed = list(given) if isinstance(given, list | tuple) else [given]
    return listed * dims if len(listed) == 1 else listed


def _rows(value: Tensor) -> Tensor:
    """Every leading dim in one; a view where it can be, and with sizes of 0."""
    return value.flatten(0, -2) if value.ndim > 1 else value.unsqueeze(0)


def _by_columns(matrix: Tensor) -> bool:
    return matrix.stride() == (1, matrix.shape[0])
