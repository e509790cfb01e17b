"""Small parts that the makers of rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from whalepy.program.axes import Size, as_size
from whalepy.program.call import Call
from whalepy.program.rules import Rule, Tokens

Maker = Callable[[Call], "Rule | None"]
ONE = (frozenset({0}),)
"""Linear in the first operand."""
_LETTERS = "abcdefghijklmnopqrstuvw"


def letters(rank: int, skip: str = "") -> list[str]:
    """As many factors as there are dims."""
    return [letter for letter in _LETTERS if letter not in skip][:rank]


def write(inputs: Sequence[Sequence[object]], outputs: Sequence[Sequence[object]], **more: object) -> Rule:
    """A rule from its tokens, one sequence per operand and per result."""

    def tokens(entry: Sequence[object]) -> Tokens:
        return tuple(entry)  # type: ignore[arg-type]

    return Rule(tuple(map(tokens, inputs)), tuple(map(tokens, outputs)), **more)  # type: ignore[arg-type]


def along(call: Call, dims: Sequence[int], *, fresh: bool = False, linear: bool = False) -> Rule | None:
    """Same dims in and out, `dims` whole; `fresh` where the result's are other axes than the operand's."""
    source = letters(call.ranks[0])
    out = list(source)
    for d in dims:
        source[d] = source[d].upper()
        out[d] = "_" if fresh else source[d]
    if any(result.ndim != call.ranks[0] for result in call.results) or len(call.operands) != 1:
        return None
    return write([source], [out] * len(call.results), linear=ONE if linear else ())


def result_sizes(call: Call, r: int = 0) -> tuple[Size, ...]:
    """Sizes of a result."""
    return tuple(as_size(size) for size in call.results[r].shape)


def overload(call: Call) -> str:
    """The overload's name: `dtype` of `aten.view.dtype`."""
    return str(getattr(call.node.target, "_overloadname", ""))


def is_count(value: object) -> bool:
    """Whether an argument is a plain whole number, not one that only a step tells."""
    return isinstance(value, int) and not isinstance(value, bool | torch.SymInt)
