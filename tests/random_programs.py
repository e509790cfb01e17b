"""Random programs: the source of a model composed of random steps, under random scopes, and its batches.

A program is drawn as lists of small numbers (`Draft`), so that hypothesis can shrink it: a step that is dropped leaves
the others what they were, and smaller numbers make plainer steps. `program_of` runs the model locally while it grows; a
step that fails there, or makes a value or gradient that is not finite, is left out. The result is plain source text.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional

import whalepy
from tests.random_steps import LOSSES, MAKERS, Picks, Size

PROBES = (5, 7)  # rows of the batches that the program grows on: a size that differs between them follows the rows
MOST_ELEMENTS = 600  # of a value, at five rows
LARGEST = 30.0  # magnitude of values; beyond it rounding says little about a program
GRADIENTS = (1e-5, 1e3)  # the largest gradient: below it a program computes little else than rounding

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """The choices that a program is made of."""

    steps: tuple[tuple[str, Numbers], ...]
    start: Numbers
    """The input's sizes, the rows of the batches, the loss, what is frozen."""
    scopes: Numbers


@dataclass(frozen=True)
class Program:
    """A model as source, with its scopes and the rows of its batches."""

    modules: tuple[str, ...]
    body: tuple[str, ...]
    loss: str
    input: tuple[int, ...]
    rows: tuple[int, ...]
    world: int = 1
    spec: str = "1xcpu"
    annotations: str = "{}"
    scopes: tuple[str, ...] = ()
    """`s1 = whalepy.split(2)`; the body enters them."""

    def __str__(self) -> str:
        """Python that can be run, but for the launch of its ranks."""
        given = [f"# {self.world} ranks of {self.spec}, rows {self.rows}, x [rows, {str(self.input)[1:-1]}]"]
        given += [f"# whalepy.annotate(model, {self.annotations})", *self.scopes, "", ""]
        return "\n".join([*given, *self._class()]) + "\n"

    def _class(self) -> list[str]:
        made = [f"        {line}" for line in self.modules]
        lines = [f"        {line}" for text in self.body for line in text.splitlines()]
        read = [name for name in ("x", "ids", "labels") if self.reads(name)]
        head = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()", *made]
        return [*head, "", f"    def forward(self, {', '.join(read)}):", *lines, f"        return {self.loss}"]

    def reads(self, name: str) -> bool:
        """Whether the model takes this input."""
        return name == "x" or re.search(rf"\b{name}\b", " ".join([*self.body, self.loss])) is not None

    def made(self) -> tuple[nn.Module, list[Any]]:
        """The model and its batches, the same on every rank."""
        torch.manual_seed(0)
        text, name = str(self), "random_program.py"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional, "whalepy": whalepy}
        exec(compile(text, name, "exec"), space)
        model = space["Model"]()
        return model, [tuple(v for k, v in batch(rows, self.input).items() if self.reads(k)) for rows in self.rows]

    def annotated(self) -> Mapping[str, Any]:
        """Its annotations by path, made anew."""
        return eval(self.annotations, {"whalepy": whalepy})


def batch(rows: int, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """The inputs that a program may read."""
    made = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, 5, (rows,), generator=made)
    labels[1:2] = -100
    x = torch.randn(rows, *sizes, generator=made, dtype=torch.float64)
    return {"x": x, "ids": torch.randint(0, 8, (rows, 3), generator=made), "labels": labels}


_NUMBER = st.integers(0, 63)
_STEP = st.tuples(st.sampled_from(list(MAKERS)), st.lists(_NUMBER, min_size=6, max_size=6).map(tuple))
_NUMBERS = st.lists(_NUMBER, min_size=8, max_size=8).map(tuple)
DRAFTS: st.SearchStrategy[Draft] = st.builds(
    Draft, st.lists(_STEP, min_size=1, max_size=7).map(tuple), _NUMBERS, _NUMBERS
)


Scoping = Callable[["Program", "Picks"], "Program"]


def program_of(draft: Draft, scoping: Scoping | None = None) -> Program | None:
    """The program of a draft, under scopes of some kind; None where nothing of it trains."""
    p = Picks(draft.start)
    sizes = p.one([(4,), (3, 4), (4, 6), (2, 4, 4), (6,), (4, 2, 3)])
    grown = Growing(sizes)
    grown.take(p.one(["out = x * self.gain", "out = x * 1.0"]))
    for kind, numbers in draft.steps:
        grown.step(kind, Picks(numbers))
    return grown.finished(p, Picks(draft.scopes), scoping or scoped)


@dataclass
class Growing:
    """A program that grows, run on two batches of different rows."""

    input: tuple[int, ...]
    modules: list[str] = field(default_factory=list[str])
    body: list[str] = field(default_factory=list[str])
    spaces: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _fresh: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.modules.append(f"self.gain = nn.Parameter(torch.ones({self.input[-1]}))")
        self._restart()

    # -- what makers see

    def values(self) -> list[str]:
        return [f"v{i}" for i in reversed(range(len(self.body)))]

    def sizes(self, name: str) -> tuple[Size, ...]:
        few, more = (space[name].shape for space in self.spaces)
        return tuple(a if a == b else None for a, b in zip(few, more, strict=True))

    def module(self, text: str) -> str:
        name = f"m{len(self.modules) + len(self._fresh)}"
        fixed = text.startswith("torch.")
        self._fresh.append(f"self.register_buffer('{name}', {text})" if fixed else f"self.{name} = {text}")
        return f"self.{name}"

    def made(self, kind: str) -> list[tuple[str, tuple[int, ...]]]:
        found = re.findall(rf"(self\.m\d+) = {re.escape(kind)}\((\d+), (\d+)", "\n".join(self.modules))
        return [(name, (int(a), int(b))) for name, a, b in found]

    # -- growing

    def step(self, kind: str, p: Picks) -> None:
        """One more step, where it works."""
        self._fresh = []
        text = MAKERS[kind](self, p)
        if text is not None:
            self.take(text)

    def take(self, text: str) -> bool:
        """Adds a statement and its modules if the program still trains with them."""
        before = (list(self.modules), list(self.body))
        self.modules += self._fresh
        self._fresh = []
        text = re.sub(r"\bout\b", f"v{len(self.body)}", text)
        try:
            for line in self.modules[len(before[0]) :]:
                self._run_each(f"{line}\nself.double()")
            self.body.append(text)
            self._run_each(text)
            if all(self._sound(space) for space in self.spaces):
                return True
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
            pass
        self.modules, self.body = before
        self._restart()
        return False

    def _restart(self) -> None:
        torch.manual_seed(0)
        self.spaces = []
        for rows in PROBES:
            space: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional, "self": nn.Module()}
            self.spaces.append({**space, **batch(rows, self.input)})
        self._run_each("\n".join([*self.modules, "self.double()", *self.body]))

    def _run_each(self, text: str) -> None:
        for space in self.spaces:
            exec(text, space)

    def _sound(self, space: dict[str, Any]) -> bool:
        """Whether values are finite and small, and gradients too."""
        values = [space[name] for name in self.values()]
        newest = values[0]
        if not isinstance(newest, Tensor) or newest.dtype != torch.float64 or not newest.numel():
            return False
        if newest.numel() > MOST_ELEMENTS or newest.ndim > 5 or not float(newest.detach().abs().max()) < LARGEST:
            return False
        gradients = _gradients(sum(v.sum() for v in values), space["self"])
        return all(bool((g.abs() < GRADIENTS[1]).all()) for g in gradients)

    # -- the loss and the scopes

    def finished(self, p: Picks, scopes: Picks, scoping: Scoping) -> Program | None:
        """The whole program; None where no loss trains it."""
        rows = (p.one([6, 8, 5, 7, 9]), p.one([5, 4, 3, 2, 8, 6, 7, 1]))
        frozen = self._frozen(p)
        at = p.below(len(LOSSES))
        for loss in (LOSSES[at], LOSSES[0]):
            modules = (*self.modules, *self._head(loss), *frozen)
            made = Program(modules, tuple(self.body), self._loss(loss), self.input, rows)
            gained = replace(made, body=("v0 = x * self.gain", *made.body[1:]))
            for some in (made, replace(made, rows=PROBES), gained):
                if trains(some):
                    return scoping(some, scopes)
        return None

    def _frozen(self, p: Picks) -> list[str]:
        names = [name for name, _ in self.made("nn.Linear")]
        texts = [f"{name}{part}.requires_grad_(False)" for part in ("", ".weight") for name in names]
        return [p.one(texts)] if texts and p.below(4) == 3 else []

    def _head(self, loss: str) -> list[str]:
        sizes = self.sizes(self.values()[0])
        if "head" not in loss or None in sizes[1:]:
            return []
        width = 1
        for size in sizes[1:]:
            width *= size or 1
        return [f"self.head = nn.Linear({width}, 5)"]

    def _loss(self, loss: str) -> str:
        """Of the last value, and a little of those that nothing reads."""
        newest, *others = self.values()
        text = " ".join(self.body)
        unread = [name for name in others if len(re.findall(rf"\b{name}\b", text)) == 1][:3]
        return " + ".join([loss.format(v=newest), *(f"0.1 * ({name} ** 2).mean()" for name in unread)])


def _gradients(loss: Any, model: nn.Module) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return []
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


def trains(program: Program) -> bool:
    """Whether every batch gives a finite loss, and gradients that are neither rounding nor huge."""
    try:
        model, batches = program.made()
        model.double()
        for one in batches:
            loss = model(*one)
            largest = max([float(g.abs().max()) for g in _gradients(loss, model) if g.numel()], default=0.0)
            if loss.ndim or not loss.isfinite() or not GRADIENTS[0] < largest < GRADIENTS[1]:
                return False
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return False
    return True


# -- scopes

SHARES = {2: ["", ", shares=(3, 1)", ", shares=(1, 0)", ", shares=(2, 5)"], 3: ["", ", shares=(5, 2, 1)"]}


def scoped(program: Program, p: Picks) -> Program:
    """The program under random scopes, on the ranks that they need."""
    kinds = [_whole, _whole, _inside, _inside, _siblings, _on_modules, _on_one_axis, _nested, _three, _nothing]
    return p.one(kinds)(program, p)


def staged(program: Program, p: Picks) -> Program:
    """The program in stages: alone, replicated, or with scopes inside the second."""
    return p.one([_stages, _stages, _replicated_stages, _wider_stage, _wider_stage, _three_stages])(program, p)


def _cut(program: Program, p: Picks, *scopes: str, **changes: Any) -> Program:
    """The body cut into stages anywhere; a few statements may be outside each."""
    at = sorted(p.below(len(program.body) + 1) for _ in scopes[1:])
    parts = [program.body[a:b] for a, b in pairwise((0, *at, len(program.body)))]
    body: list[str] = []
    for scope, part in zip(scopes, parts, strict=True):
        body += _entered(part, scope, p) if p.below(3) == 0 else _around(part, scope)
    return replace(program, body=tuple(body), **changes)


def _around(body: tuple[str, ...], scope: str) -> tuple[str, ...]:
    inside = "\n".join(f"    {line}" for text in body for line in text.splitlines())
    return (f"with {scope}:\n{inside}",) if body else ()


def _stages(program: Program, p: Picks) -> Program:
    scopes = ("s1 = whalepy.stage()", "s2 = whalepy.stage()")
    return _cut(program, p, "s1", "s2", world=2, spec="2xcpu", scopes=scopes)


def _three_stages(program: Program, p: Picks) -> Program:
    scopes = tuple(f"s{k} = whalepy.stage()" for k in (1, 2, 3))
    return _cut(program, p, "s1", "s2", "s3", world=3, spec="3xcpu", scopes=scopes)


def _replicated_stages(program: Program, p: Picks) -> Program:
    around = p.one(["{}", f"{{'': whalepy.replicate(2{p.one(SHARES[2])})}}"])
    return replace(_stages(program, p), world=4, spec="4xcpu", annotations=around)


def _wider_stage(program: Program, p: Picks) -> Program:
    scopes = ("s1 = whalepy.stage(1)", "s2 = whalepy.stage(2)", f"t2 = {_primitive(p)}")
    ends = ("s1", "s2, t2") if p.below(2) else ("s2, t2", "s1")
    return _cut(program, p, *ends, world=3, spec="3xcpu", scopes=scopes)


def _primitive(p: Picks, degree: int = 2) -> str:
    return f"whalepy.{p.one(['replicate', 'split'])}({degree}{p.one(SHARES[degree])})"


def _two(program: Program, p: Picks, **changes: Any) -> Program:
    spec = p.one(["2xcpu", "2xcpu", "2xcpu", "1xcpu + 1xcpu*0.5"])
    return replace(program, world=2, spec=spec, **changes)


def _whole(program: Program, p: Picks) -> Program:
    return _two(program, p, annotations=f"{{'': {_primitive(p)}}}")


def _three(program: Program, p: Picks) -> Program:
    return replace(program, world=3, spec="3xcpu", annotations=f"{{'': {_primitive(p, 3)}}}")


def _nothing(program: Program, p: Picks) -> Program:
    return _two(program, p)


def _inside(program: Program, p: Picks) -> Program:
    """Some of the statements, perhaps inside a replicate that has no device to itself."""
    split = f"s1 = whalepy.split(2{p.one(SHARES[2])})"
    around = p.one(["{}", "{'': whalepy.replicate()}", "{'': whalepy.replicate(1)}"])
    return _two(program, p, scopes=(split,), body=_entered(program.body, "s1", p), annotations=around)


def _siblings(program: Program, p: Picks) -> Program:
    """Two scopes one after the other."""
    middle = len(program.body) // 2
    body = (*_entered(program.body[:middle], "s1", p), *_entered(program.body[middle:], "s2", p))
    return _two(program, p, scopes=(f"s1 = {_primitive(p)}", f"s2 = {_primitive(p)}"), body=body)


def _nested(program: Program, p: Picks) -> Program:
    """replicate > split on two by two ranks."""
    around = f"{{'': whalepy.replicate(2{p.one(SHARES[2])})}}"
    inner = f"s1 = whalepy.split(2{p.one(SHARES[2])})"
    body = _entered(program.body, "s1", p)
    return replace(program, world=4, spec="4xcpu", annotations=around, scopes=(inner,), body=body)


def _on_modules(program: Program, p: Picks) -> Program:
    names = re.findall(r"self\.(m\d+) = nn\.(?:Linear|Conv|Embedding)", "\n".join(program.modules))
    called = [name for name in names if f"self.{name}(" in " ".join(program.body)]
    if not called:
        return _whole(program, p)
    entries = [f"'{name}': {_primitive(p)}" for name in called[: 1 + p.below(3)]]
    return _two(program, p, annotations="{" + p.one([", ".join(entries), f"'m*': {_primitive(p)}"]) + "}")


def _on_one_axis(program: Program, p: Picks) -> Program:
    found = re.findall(r"self\.(m\d+) = nn\.Linear\((\d+), (\d+)", "\n".join(program.modules))
    dims = [(name, d) for name, *sizes in found for d, size in enumerate(reversed(sizes)) if int(size) > 1]
    dims = [(name, d) for name, d in dims if f"self.{name}(" in " ".join(program.body)]
    if not dims:
        return _whole(program, p)
    name, d = p.one(dims)
    path = p.one([name, ""])
    return _two(program, p, annotations=f"{{'{path}': whalepy.split(2{p.one(SHARES[2])}, on='{name}.weight:{d}')}}")


def _entered(body: tuple[str, ...], scope: str, p: Picks) -> tuple[str, ...]:
    """The body with a run of its statements inside a scope."""
    if not body:
        return body
    first = p.below(len(body))
    last = first + 1 + p.below(len(body) - first)
    inside = "\n".join(f"    {line}" for text in body[first:last] for line in text.splitlines())
    return (*body[:first], f"with {scope}:\n{inside}", *body[last:])
