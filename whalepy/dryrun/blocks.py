"""The blocks that a model is made of, and the model with the most alike of them left out for a while."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from whalepy.planner.work import KEPT, Fold
from whalepy.primitives import Primitive
from whalepy.primitives.annotate import scopes_on

LEAST_REPEATS = 5
"""Blocks that repeat less often are all run: leaving few out saves little."""
LEAST_IN_STAGES = KEPT + 1
"""The same where each stage leaves some out."""
_MOST_PERIOD = 8
"""Layers in turn, such as one with full attention after five with windows."""


@dataclass(frozen=True)
class Blocks:
    """Blocks by number, and which of them repeat."""

    paths: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()
    whole: tuple[str, ...] = ()
    """The paths of all blocks of the whole model; empty where these are all."""

    def of(self, path: str) -> int:
        """The number of the block that a module or parameter lies in; -1 outside all."""
        numbers, end = self._numbers, len(path)
        while end > 0:
            if (number := numbers.get(path[:end])) is not None:
                return number
            end = path.rfind(".", 0, end)
        return -1

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {path: number for number, path in enumerate(self.paths)}

    @cached_property
    def stand_ins(self) -> tuple[int, ...]:
        """For each block of the whole model the number of the one that was run for it."""
        found: list[int] = []
        starts = {fold.first: fold for fold in self.folds}
        at = 0
        while at < len(self.paths):
            fold = starts.get(at)
            if fold is None:
                found.append(at)
                at += 1
                continue
            for repeat in range(fold.repeats):
                found += fold.blocks(0 if repeat == 0 else KEPT - 1 if repeat == fold.repeats - 1 else 1)
            at += KEPT * fold.period
        return tuple(found)

    @cached_property
    def stand_for(self) -> tuple[tuple[str, ...], ...]:
        """By number, the paths of the blocks of the whole model that one stands for."""
        found: list[list[str]] = [[] for _ in self.paths]
        for path, number in zip(self.whole or self.paths, self.stand_ins, strict=True):
            found[number].append(path)
        return tuple(map(tuple, found))

    def repeats(self, path: str) -> float:
        """How many parts of the whole model one of this path stands for: 0 where others stand for it."""
        block = self.of(path)
        for fold in self.folds:
            if block in fold.blocks(1):
                return fold.repeats - KEPT + 1
        return 1

    def stand_for_all(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the three repeats of every fold do the same in a program, one after another.

        Not so where a model skips some of its blocks, takes them from the end, or counts them.
        """
        calls: dict[int, list[Any]] = {}
        for node in nodes:
            path = module_of(node)
            if node.op == "call_function" and path is not None:
                calls.setdefault(self.of(path), []).append(node.target)
        order = [block for block in calls if block >= 0]  # by their first operators
        return all(
            order.index(a) < order.index(b) and calls[a] == calls[b]
            if a in calls and b in calls
            else a not in calls and b not in calls
            for fold in self.folds
            for repeat in range(KEPT - 1)
            for a, b in zip(fold.blocks(repeat), fold.blocks(repeat + 1), strict=True)
        )


NO_BLOCKS = Blocks()


def module_of(node: fx.Node) -> str | None:
    """The path, within the user's model, of the module that an operator runs in; None where the capture is silent."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    path = str(stack[-1][0])  # the captured module holds the user's as `model`
    return "" if path == "model" else path.removeprefix("model.")


@contextmanager
def folded(
    model: nn.Module,
    *,
    fold: bool = True,
    least: int = LEAST_REPEATS,
    scopes: Mapping[str, Sequence[Primitive]] | None = None,
) -> Generator[Blocks]:
    """The blocks of the model; inside, blocks that repeat, `least` times or more, are there three times only.

    Blocks are the members of the outermost lists of modules. They repeat where classes, shapes and plain attributes
    are the same, except for a number that is the place of a block in its list. The model is whole again afterwards.
    `scopes`: by path, what tells blocks apart in place of the scopes that stand on them.
    """
    changed: list[tuple[nn.Module, dict[str, Any]]] = []
    paths: list[str] = []
    whole: list[str] = []
    folds: list[Fold] = []
    try:
        for path, container in list(_containers(model)):
            names = list(container._modules)
            own = [f"{path}.{name}" if path else name for name in names]
            whole += own
            apart = None if scopes is None else [tuple(scopes.get(each, ())) for each in own]
            runs = _runs([container._modules[name] for name in names], least, apart) if fold else []
            left = _left(len(names), runs)
            for start, period, repeats in runs:
                before = sum(number < start for number in left)
                folds.append(Fold(len(paths) + before, period, repeats))
            if runs:
                changed.append((container, dict(container._modules)))
                _keep(container, [names[number] for number in left])
            paths += [f"{path}.{name}" if path else name for name in container._modules]
        yield Blocks(tuple(paths), tuple(folds), tuple(whole))
    finally:
        for container, modules in changed:
            container._modules.clear()
            container._modules.update(modules)


def _keep(container: nn.Module, names: Sequence[str]) -> None:
    """Only these members; where they are numbered, numbered anew."""
    kept = [container._modules[name] for name in names]
    numbered = all(name.isdigit() for name in container._modules)
    container._modules.clear()
    for k, (name, module) in enumerate(zip(names, kept, strict=True)):
        container._modules[str(k) if numbered else name] = module


def _left(count: int, runs: Sequence[tuple[int, int, int]]) -> list[int]:
    """The members that stay."""
    gone = {k for start, period, repeats in runs for k in range(start + KEPT * period, start + repeats * period)}
    return [k for k in range(count) if k not in gone]


def _containers(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists of modules with several members."""
    if isinstance(model, nn.ModuleList | nn.Sequential) and len(model._modules) > 1:
        yield path, model
        return
    for name, child in model.named_children():
        yield from _containers(child, f"{path}.{name}" if path else name)


def _runs(
    members: Sequence[nn.Module | None], least: int, apart: Sequence[Hashable] | None = None
) -> list[tuple[int, int, int]]:
    """Stretches of members that repeat so often or more: (first, period, repeats)."""
    places = _places(members)
    forms = [_form(member, places, scoped=apart is None) for member in members]
    forms = forms if apart is None else [*zip(forms, apart, strict=True)]
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(forms):
        ways = ((period, _repeats(forms[at:], period)) for period in range(1, _MOST_PERIOD + 1))
        period, repeats = max(ways, key=lambda way: (way[0] * way[1] if way[1] >= least else 0, -way[0]))
        if repeats >= least:
            found.append((at, period, repeats))
            at += period * repeats
        else:
            at += 1
    return found


def _repeats(forms: Sequence[Hashable], period: int) -> int:
    """How often the first `period` forms come in a row."""
    count = 1
    while forms[count * period : (count + 1) * period] == forms[:period]:
        count += 1
    return count


def _places(members: Sequence[nn.Module | None]) -> frozenset[str]:
    """Attributes, by path within a member, that are the place of every member in the list."""
    own: list[set[str]] = []
    for place, member in enumerate(members):
        modules = () if member is None else member.named_modules()
        found = ((path, name, value) for path, module in modules for name, value in vars(module).items())
        own.append({f"{path}.{name}" for path, name, value in found if type(value) is int and value == place})
    return frozenset(set[str].intersection(*own))


def _form(module: nn.Module | None, places: frozenset[str], path: str = "", *, scoped: bool = True) -> Hashable:
    """What a member is made of."""
    if module is None:
        return None
    if "forward" in module.__dict__ and not scopes_on(module):
        return object()  # somebody has replaced its forward
    tensors = (*module._parameters.items(), *module._buffers.items())
    plain = ((name, _plain(value)) for name, value in vars(module).items() if name[0] != "_")
    return (
        type(module),
        tuple((name, None if t is None else (t.shape, t.dtype, t.requires_grad)) for name, t in tensors),
        tuple(sorted((name, value) for name, value in plain if f"{path}.{name}" not in places)),
        tuple(map(_alike, scopes_on(module).get("", ()))) if scoped or path else (),
        tuple((name, _form(c, places, f"{path}.{name}" if path else name)) for name, c in module._modules.items()),
    )


def _alike(scope: Primitive) -> Hashable:
    """Equal for levels that one line made, a scope per block: they cut all of these in the same way."""
    return (scope.kind, scope.at, repr(scope)) if scope.kind in ("replicate", "split") else scope


def _plain(value: Any) -> str:
    plain = isinstance(value, bool | int | float | str | tuple | type(None))
    return repr(value) if plain else type(value).__qualname__
