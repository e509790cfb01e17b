"""The example inputs of a capture: leaves, their names, their batch dims, and stand-ins of capture size."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from whalepy.errors import CaptureError

BatchDim = int | Mapping[str | int, int | None] | None

_CONSTANT_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)


@dataclass(frozen=True)
class Leaf:
    """One leaf of (args, kwargs): a tensor, or a constant which the capture bakes in."""

    name: str  # "args[0]", "kwargs['labels']", "kwargs['x'][0]"
    aliases: tuple[str | int, ...]  # what a batch_dim mapping may call it
    value: Any


def flatten_inputs(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Leaf, ...], pytree.TreeSpec]:
    """The leaves of (args, kwargs) in pytree order, and the tree. CaptureError: a leaf that cannot be an input."""
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    names = positional_names(forward)
    leaves = tuple(_leaf(path, value, names) for path, value in paths)
    for leaf in leaves:
        _check_leaf(leaf)
    return leaves, spec


def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters of `forward` that can be given by position; empty when it has no signature."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def _leaf(path: Any, value: Any, names: tuple[str, ...]) -> Leaf:
    in_kwargs = path[0].idx == 1
    key = path[1].key if in_kwargs else path[1].idx
    name = ("kwargs" if in_kwargs else "args") + pytree.keystr(path[1:])
    aliases: list[str | int] = [name, key]
    if not in_kwargs and key < len(names):
        aliases.append(names[key])
    return Leaf(name, tuple(aliases), value)


def _check_leaf(leaf: Leaf) -> None:
    if isinstance(leaf.value, (torch.Tensor, *_CONSTANT_TYPES)):
        return
    kind = type(leaf.value).__name__
    raise CaptureError(
        f"input {leaf.name} is a {kind}, which is neither a tensor nor a plain constant",
        fix="give tensors, numbers, strings, None, or tuples, lists and dicts of them",
    )


def batch_dims(leaves: tuple[Leaf, ...], batch_dim: BatchDim) -> tuple[int | None, ...]:
    """The batch dim of each leaf, None where it has none.

    With an int, a tensor too small to have that dim, or of size 1 where others are larger, has no batch dim.
    CaptureError: sizes that differ, a name in the mapping that is no input, or no such dim.
    """
    if isinstance(batch_dim, Mapping):
        dims = _mapped_dims(leaves, batch_dim)
    else:
        dims = _common_dims(leaves, batch_dim)
    _check_rows(leaves, dims)
    return dims


def _mapped_dims(leaves: tuple[Leaf, ...], mapping: Mapping[str | int, int | None]) -> tuple[int | None, ...]:
    known = {alias for leaf in leaves for alias in leaf.aliases}
    for key in mapping:
        if key not in known:
            names = ", ".join(leaf.name for leaf in leaves)
            raise CaptureError(f"batch_dim names {key!r}, which is no input", fix=f"use one of {names}")
    return tuple(_mapped_dim(leaf, mapping) for leaf in leaves)


def _mapped_dim(leaf: Leaf, mapping: Mapping[str | int, int | None]) -> int | None:
    chosen = [mapping[alias] for alias in leaf.aliases if alias in mapping]
    dim = chosen[0] if chosen else 0
    if dim is None or not isinstance(leaf.value, torch.Tensor):
        return None
    rank = leaf.value.dim()
    if -rank <= dim < rank:
        return dim % rank
    if chosen:
        raise CaptureError(f"input {leaf.name} has {rank} dims, so that batch_dim={dim} does not exist")
    return None


def _common_dims(leaves: tuple[Leaf, ...], batch_dim: int | None) -> tuple[int | None, ...]:
    dims = [_dim_within(leaf.value, batch_dim) for leaf in leaves]
    rows = [leaf.value.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    if max(rows, default=1) > 1:
        dims = [
            None if dim is not None and leaf.value.shape[dim] == 1 else dim
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
    return tuple(dims)


def _dim_within(value: Any, batch_dim: int | None) -> int | None:
    if batch_dim is None or not isinstance(value, torch.Tensor):
        return None
    rank = value.dim()
    return batch_dim % rank if -rank <= batch_dim < rank else None


def _check_rows(leaves: tuple[Leaf, ...], dims: tuple[int | None, ...]) -> None:
    rows = {leaf.name: leaf.value.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise CaptureError(
            f"the inputs differ in their number of rows: {listed}",
            fix="give batch_dim= as a mapping: input -> dim, or None for one that is the same on every rank",
        )


def capture_rows(leaves: Sequence[Leaf], dims: Sequence[int | None], taken: frozenset[int]) -> int | None:
    """The number of rows to capture with: a multiple of the example's that no other dim has; None without a batch.

    Export decides `size == other size` on the sizes it sees, so that equal sizes of different meaning would merge;
    a multiple keeps what the model may require of the batch (an even number of rows, say).
    """
    rows = [leaf.value.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    if not rows or rows[0] == 0:
        return None
    others = set(taken)
    for leaf, batch in zip(leaves, dims, strict=True):
        if isinstance(leaf.value, torch.Tensor):
            others.update(size for dim, size in enumerate(leaf.value.shape) if dim != batch)
    count = rows[0]
    while count < 2 or count in others:
        count += rows[0]
    return count


def stand_ins(
    leaves: Sequence[Leaf], dims: Sequence[int | None], rows: int | None, device: torch.device
) -> list[torch.Tensor]:
    """Uninitialised tensors, all distinct, for the tensor leaves: their shapes with `rows` rows, on `device`."""
    return [
        torch.empty(_resized(leaf.value.shape, dim, rows), dtype=leaf.value.dtype, device=device)
        for leaf, dim in zip(leaves, dims, strict=True)
        if isinstance(leaf.value, torch.Tensor)
    ]


def _resized(shape: torch.Size, dim: int | None, rows: int | None) -> list[int]:
    sizes = list(shape)
    if dim is not None and rows is not None:
        sizes[dim] = rows
    return sizes
