"""What a rule makes of one operator: axes that are the same, and the ways in which the operator can be sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from whalepy.program.axes import Axes, Dim
from whalepy.program.rules import NEVER, Rule, Tokens, is_whole

Dims = tuple[Dim, ...]


@dataclass(frozen=True, order=True)
class Place:
    """Where an axis stands in a value: the dim, the position in the dim's product, and the axis itself.

    The axis differs from the leaf at that position only where the leaf is a sum: then every part is cut along it.
    """

    dim: int
    term: int
    axis: int


@dataclass(frozen=True)
class Option:
    """One way to shard an operator: where the axis stands in each operand and result (None: it is lacking there)."""

    axis: int
    inputs: tuple[Place | None, ...]
    outputs: tuple[Place | None, ...]
    kernel: str | None = None


def unify(axes: Axes, rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims], counted: dict[str, Dim]) -> None:
    """Make the axes of an operator's operands and results the same where its rule says so.

    `counted` keeps the axes of factors that only a known size defines, from one call for this operator to the next.
    """
    if rule.flat:
        axes.match(_flat(inputs[0]), _flat(outputs[0]))
        return
    if rule.concatenated is not None:
        _unify_concatenation(axes, rule.concatenated, inputs[0], outputs)
    factors = _factor_dims(axes, rule, inputs, outputs, counted)
    for dims in factors.values():
        present = [dim for dim in dims if axes.leaves(dim)]
        for other in present[1:]:
            axes.match(present[0], other)


def _unify_concatenation(axes: Axes, dim: int, source: Dims, outputs: Sequence[Dims]) -> None:
    leaves = axes.leaves(source[dim])
    if len(leaves) == 1:
        axes.concatenate(leaves[0], [output[dim] for output in outputs])


def _flat(dims: Dims) -> Dim:
    return tuple(axis for dim in dims for axis in dim)


def _entries(rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims]) -> Iterator[tuple[Tokens, Dims]]:
    yield from zip(rule.inputs, inputs, strict=True)
    yield from zip(rule.outputs, outputs, strict=True)


def _factor_dims(
    axes: Axes, rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims], counted: dict[str, Dim]
) -> dict[str, list[Dim]]:
    """Every dim in which a factor stands; product dims are refined into their factors first."""
    factors: dict[str, list[Dim]] = {}
    products: list[tuple[tuple[str, ...], Dim]] = []
    for tokens, dims in _entries(rule, inputs, outputs):
        for token, dim in zip(tokens, dims, strict=True):
            if isinstance(token, tuple):
                products.append((token, dim))
            elif token != NEVER:
                factors.setdefault(token, []).append(dim)
    for token, dim in products:
        for name, part in zip(token, _refined(axes, rule, token, dim, factors, counted), strict=True):
            if part is not None:
                factors.setdefault(name, []).append(part)
    return factors


def _refined(
    axes: Axes,
    rule: Rule,
    names: tuple[str, ...],
    dim: Dim,
    factors: dict[str, list[Dim]],
    counted: dict[str, Dim],
) -> list[Dim | None]:
    """The parts of a product dim, by factor; None for all where the dim does not come apart that way."""
    known: list[Dim] = []
    for name in names:
        if name in factors:
            known.append(factors[name][0])
        elif name in rule.sizes:
            if name not in counted:
                counted[name] = axes.dim(rule.sizes[name])
            known.append(counted[name])
        else:
            return [None] * len(names)
    flat = tuple(axis for part in known for axis in part)
    axes.match(dim, flat)
    return list(known) if axes.leaves(dim) == axes.leaves(flat) else [None] * len(names)


def options(axes: Axes, rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims]) -> tuple[Option, ...]:
    """Every way to shard the operator, in the order of its factors; stable for equal input."""
    if rule.flat:
        return tuple(_flat_options(axes, inputs[0], outputs[0]))
    found = list(_factor_options(axes, rule, inputs, outputs))
    if rule.concatenated is not None:
        found.extend(_concatenation_options(axes, rule.concatenated, inputs[0], outputs))
    return tuple(found)


def _flat_options(axes: Axes, source: Dims, result: Dims) -> Iterator[Option]:
    left, right = _positions(axes, source), _positions(axes, result)
    for i, j in aligned([[leaf for leaf, _, _ in left], [leaf for leaf, _, _ in right]]):
        leaf, dim, term = left[i]
        _, dim_out, term_out = right[j]
        for axis in axes.shardable_inside(leaf):
            yield Option(axis, (Place(dim, term, axis),), (Place(dim_out, term_out, axis),))


def _positions(axes: Axes, dims: Dims) -> list[tuple[int, int, int]]:
    return [(leaf, d, t) for d, dim in enumerate(dims) for t, leaf in enumerate(axes.leaves(dim))]


def aligned(lists: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Positions, one per list, at which all lists agree counted from the start or from the end."""
    shortest = min(map(len, lists))
    start = 0
    while start < shortest and len({items[start] for items in lists}) == 1:
        yield (start,) * len(lists)
        start += 1
    end = 1
    while end <= shortest - start and len({items[-end] for items in lists}) == 1:
        yield tuple(len(items) - end for items in lists)
        end += 1


def _factor_options(axes: Axes, rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims]) -> Iterator[Option]:
    where = _occurrences(axes, rule, inputs, outputs)
    for name, spots in where.items():
        if is_whole(name) or not spots:
            continue
        leaves = [list(spot.leaves) for spot in spots]
        for terms in aligned(leaves):
            leaf = leaves[0][terms[0]]
            for axis in axes.shardable_inside(leaf):
                places = {s.value: Place(s.dim, s.offset + t, axis) for s, t in zip(spots, terms, strict=True)}
                count = len(inputs)
                yield Option(
                    axis,
                    tuple(places.get(i) for i in range(count)),
                    tuple(places.get(count + i) for i in range(len(outputs))),
                    rule.kernels.get(name),
                )


@dataclass(frozen=True)
class _Spot:
    value: int
    dim: int
    offset: int
    leaves: Dim


def _occurrences(axes: Axes, rule: Rule, inputs: Sequence[Dims], outputs: Sequence[Dims]) -> dict[str, list[_Spot]]:
    """For each factor, where it stands; a factor standing twice in one value, or unaligned, is left out."""
    found: dict[str, list[_Spot]] = {}
    bad: set[str] = set()
    for value, (tokens, dims) in enumerate(_entries(rule, inputs, outputs)):
        for d, (token, dim) in enumerate(zip(tokens, dims, strict=True)):
            for name, offset, leaves in _parts_of(axes, token, dim, rule, bad):
                if not leaves:
                    continue
                if any(spot.value == value for spot in found.get(name, [])):
                    bad.add(name)
                found.setdefault(name, []).append(_Spot(value, d, offset, leaves))
    return {name: spots for name, spots in found.items() if name not in bad}


def _parts_of(
    axes: Axes, token: str | tuple[str, ...], dim: Dim, rule: Rule, bad: set[str]
) -> Iterator[tuple[str, int, Dim]]:
    leaves = axes.leaves(dim)
    if isinstance(token, str):
        if token != NEVER:
            yield token, 0, leaves
        return
    # A product dim: factors of known size are found from both ends, the one of open size is what they leave.
    opened = next((i for i, name in enumerate(token) if name not in rule.sizes), len(token))
    first = _taken(axes, leaves, [rule.sizes[name] for name in token[:opened]])
    back = [rule.sizes.get(name, 0) for name in token[:opened:-1]]
    last = _taken(axes, leaves[::-1], back)
    if first is None or last is None or sum(first) + sum(last) > len(leaves):
        bad.update(token)
        return
    counts = [*first, *([len(leaves) - sum(first) - sum(last)] if opened < len(token) else []), *last[::-1]]
    start = 0
    for name, count in zip(token, counts, strict=True):
        yield name, start, leaves[start : start + count]
        start += count


def _taken(axes: Axes, leaves: Dim, sizes: Sequence[int]) -> list[int] | None:
    """How many leaves each of these sizes takes, one after another; None where a size does not come out."""
    counts: list[int] = []
    start = 0
    for size in sizes:
        taken, total = start, 1
        while taken < len(leaves) and total != size and isinstance(part := axes.size(leaves[taken]), int):
            total, taken = total * part, taken + 1
        if total != size:
            return None
        counts.append(taken - start)
        start = taken
    return counts


def _concatenation_options(axes: Axes, dim: int, source: Dims, outputs: Sequence[Dims]) -> Iterator[Option]:
    leaves = axes.leaves(source[dim])
    parts = axes.parts(leaves[0]) if len(leaves) == 1 else None
    results = [axes.leaves(output[dim]) for output in outputs]
    if parts is None or list(parts) != results:
        return
    for axis in axes.shardable_inside(leaves[0]):
        places = tuple(Place(dim, result.index(axis), axis) for result in results)
        yield Option(axis, (Place(dim, 0, axis),), places)
