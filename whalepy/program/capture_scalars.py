"""Numbers that a model puts into a tensor and reads back: sizes, and what it computes of them.

`torch.tensor(x.shape[1])` is no longer known to be a size: read as a bound of a slice it would be a value in a tensor,
of which a capture knows nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Number = int | torch.SymInt

_INTEGERS = (torch.int64, torch.int32)

_MADE: frozenset[Any] = frozenset({torch.tensor, torch.as_tensor, torch.scalar_tensor})

_UNCHANGED: frozenset[Any] = frozenset(
    {
        *(torch.clone, torch.detach, torch.squeeze, Tensor.clone, Tensor.detach, Tensor.squeeze),
        *(Tensor.long, Tensor.int, Tensor.to, Tensor.cpu, Tensor.contiguous),
    }
)


def _swapped(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_COMPUTED: dict[Any, Callable[[Any, Any], Number]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), operator.add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), operator.sub),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), _swapped(operator.sub)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), operator.mul),
    **dict.fromkeys((torch.floor_divide, Tensor.floor_divide, Tensor.__floordiv__), operator.floordiv),
    Tensor.__rfloordiv__: _swapped(operator.floordiv),
    **dict.fromkeys((torch.maximum, torch.max, Tensor.maximum, Tensor.max), torch.sym_max),
    **dict.fromkeys((torch.minimum, torch.min, Tensor.minimum, Tensor.min), torch.sym_min),
}

_DIVIDED: frozenset[Any] = frozenset({torch.div, torch.divide, Tensor.div, Tensor.divide})

# Python takes no symbol for an index or an int: it fixes the size, as it does where no tensor is between.
_READ: dict[Any, Callable[[Any], Any]] = {
    **dict.fromkeys((Tensor.item, Tensor.tolist), lambda number: number),
    Tensor.__index__: operator.index,
    Tensor.__int__: int,
}

# What takes numbers where it is given scalar tensors: the arguments from this position on.
_TAKES_NUMBERS: Mapping[Any, int] = {
    **dict.fromkeys((torch.arange, torch.zeros, torch.ones, torch.empty), 0),
    **dict.fromkeys((Tensor.view, Tensor.reshape, Tensor.expand, Tensor.repeat, Tensor.narrow, torch.narrow), 1),
}
_INDEXES: frozenset[Any] = frozenset({Tensor.__getitem__, Tensor.__setitem__})


class Scalars:
    """The integer scalar tensors of a forward whose numbers are known without running it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, Number]] = {}  # by id: the tensor, its version then, its number

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, with numbers for known tensors where numbers are meant."""
        if self._known:
            number = self._number(args[0]) if func in _READ else None
            if number is not None:
                return _READ[func](number)
            args = self._with_numbers(func, args)
        result = func(*args, **kwargs)
        self._learn(func, args, kwargs, result)
        return result

    def _with_numbers(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        if func in _INDEXES:
            index = args[1]
            indices = tuple(map(self._bounds, index)) if isinstance(index, tuple) else self._bounds(index)
            return (args[0], indices, *args[2:])
        first = _TAKES_NUMBERS.get(func)
        return args if first is None else (*args[:first], *map(self._plain, args[first:]))

    def _bounds(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return index
        return slice(self._plain(index.start), self._plain(index.stop), self._plain(index.step))

    def _plain(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._plain, value)) if type(value) in (tuple, list) else value
        number = self._number(value)
        return value if number is None else number

    def _learn(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(result, Tensor) or result.dtype not in _INTEGERS or result.dim() or result.is_inference():
            return
        number = self._result(func, args, kwargs)
        if number is not None:
            self._known[id(result)] = (result, result._version, number)

    def _result(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Number | None:
        if func in _MADE:
            return _whole(args[0]) if args else None
        if func in _UNCHANGED:
            return self._number(args[0])
        operands = [number for arg in args if (number := self._operand(arg)) is not None]
        if len(operands) != 2 or len(args) != 2:
            return None
        if func in _DIVIDED:
            return _quotient(operands[0], operands[1], kwargs)
        return _COMPUTED[func](*operands) if func in _COMPUTED and not kwargs else None

    def _operand(self, value: Any) -> Number | None:
        return self._number(value) if isinstance(value, Tensor) else _whole(value)

    def _number(self, value: Any) -> Number | None:
        """The number in a known tensor; None if the tensor is not known, or was written to since."""
        tensor, version, number = self._known.get(id(value), (None, 0, 0))
        return number if tensor is not None and tensor is value and tensor._version == version else None


def _quotient(a: Number, b: Number, options: dict[str, Any]) -> Number | None:
    """The whole quotient of two sizes, where both ways of rounding are the same; None for other numbers or options."""
    rounded = options in ({"rounding_mode": "trunc"}, {"rounding_mode": "floor"})
    return a // b if rounded and statically_known_true(a >= 0) and statically_known_true(b > 0) else None


def _whole(value: Any) -> Number | None:
    return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None
