"""The analysed program as text: the scopes with what they hold, and the axes of every parameter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from whalepy.primitives import Primitive, scope_by_id
from whalepy.program.analysis import Program
from whalepy.program.axes import Dim, Size
from whalepy.program.call import sizes_of
from whalepy.program.layout import Operator

ROLES: dict[str, tuple[tuple[int, int, str], ...]] = {
    # operator: (operand, dim, name of the axis there); the first operator that has an axis names it
    "aten.scaled_dot_product_attention": (
        *((0, -3, "heads"), (0, -2, "seq"), (0, -1, "head_dim")),
        *((1, -3, "key_heads"), (1, -2, "key_seq"), (2, -1, "value_dim")),
    ),
    "aten.cross_entropy_loss": ((0, 1, "classes"),),
    "aten.embedding": ((0, 1, "embed"),),
}


def folded(name: str) -> str:
    """A dotted path with its numbers replaced by `*`: the blocks of a model read alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


# -- axes


def axes_text(program: Program) -> str:
    """One line per parameter: its name and its dims as products of named axes, outermost first; then the sizes.

    Repeated blocks are folded where they read alike. An axis is named by what operators do with it, else by the
    parameter dim that it first is; a part of a dim without such a name is given by its size. A dim that is a
    concatenation reads `[a b | a c]`.
    """
    names = _AxisNames(program)
    rows: Counter[tuple[str, str, str]] = Counter()
    for i, op in enumerate(program.operators):
        if op.kind == "parameter":
            dims = ", ".join(names.dim(dim) for dim in program.dims[i][0])
            sizes = " x ".join(str(size) for size in sizes_of(program.nodes[i].meta["val"]))
            rows[folded(program.placeholder(i).name), dims, sizes] += 1
    width = max((len(name) for name, _, _ in rows), default=0)
    lines = [
        f"{name:<{width}}  ({dims})" + (f"  x{count}" if count > 1 else "") for (name, dims, _), count in rows.items()
    ]
    return "\n".join([*lines, *names.sizes()])


class _AxisNames:
    """Names of axes, the same for the axes of repeated blocks."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of_class: dict[str, str] = {}
        self.shown: dict[str, dict[Size, None]] = {}
        if program.batch is not None:
            self.of_class[program.classes[program.batch]] = "batch"
        for i, op in enumerate(program.operators):
            for operand, dim, name in ROLES.get(op.target, ()):
                self._learn(i, operand, dim, name)

    def _learn(self, operator: int, operand: int, dim: int, name: str) -> None:
        source, result = self.program.operators[operator].operands[operand]
        dims = self.program.dims[source][result]
        leaves = self.program.axes.leaves(dims[dim]) if -len(dims) <= dim < len(dims) else ()
        if len(leaves) == 1 and leaves[0] in self.program.classes:
            taken = [n for n in self.of_class.values() if n == name or n.startswith(f"{name}.")]
            own = f"{name}.{len(taken) + 1}" if taken else name
            self.of_class.setdefault(self.program.classes[leaves[0]], own)

    def dim(self, dim: Dim) -> str:
        leaves = self.program.axes.leaves(dim)
        texts = [self._leaf(leaf, alone=len(leaves) == 1) for leaf in leaves]
        return texts[0] if len(texts) == 1 else f"({', '.join(texts)})" if texts else "1"

    def _leaf(self, leaf: int, *, alone: bool) -> str:
        parts = self.program.axes.parts(leaf)
        if parts is not None:
            return f"[{' | '.join(' '.join(self._leaf(axis, alone=False) for axis in part) for part in parts)}]"
        size, of_class = self.program.axes.size(leaf), self.program.classes.get(leaf, "")
        name = self.of_class.get(of_class)
        if name is None and not alone:
            return str(size)
        if name is None:
            name = self.of_class[of_class] = _shortest(of_class, self.of_class.values())
        self.shown.setdefault(name, {})[size] = None
        return name

    def sizes(self) -> Iterator[str]:
        if self.shown:
            texts = {name: " or ".join(map(str, sizes)) for name, sizes in self.shown.items()}
            yield "where " + ", ".join(f"{name} = {text}" for name, text in texts.items())


def _shortest(of_class: str, taken: Collection[str]) -> str:
    """`c_fc.weight:1` for `transformer.h.*.mlp.c_fc.weight:1`, longer where that is taken."""
    path, _, dim = of_class.partition(":")
    pieces = path.split(".")
    for count in range(2, len(pieces) + 1):
        name = f"{'.'.join(pieces[-count:])}:{dim}"
        if name not in taken:
            return name
    return of_class


# -- scopes


def scopes_text(program: Program) -> str:
    """A line per scope, indented by nesting: the primitive, where it was written, what it holds."""
    chains = dict.fromkeys(
        op.scope[:depth] for op in program.operators if op.kind == "call" for depth in range(len(op.scope) + 1)
    )
    return "\n".join(_scope_line(program, chain) for chain in sorted(chains, key=lambda c: _order(chains, c)))


def _order(chains: Iterable[tuple[int, ...]], chain: tuple[int, ...]) -> tuple[int, ...]:
    """Scopes by first appearance, inner ones below the one around them."""
    first = list(chains)
    return tuple(first.index(chain[: depth + 1]) for depth in range(len(chain)))


def _scope_line(program: Program, chain: tuple[int, ...]) -> str:
    own = [i for i, op in enumerate(program.operators) if op.kind == "call" and op.scope[: len(chain)] == chain]
    indent = "  " * len(chain)
    title = "program" if not chain else _title(scope_by_id(chain[-1]))
    outside = sum(program.operators[i].scope == chain for i in own)
    parameters = _parameters(program, own)
    texts = [f"{indent}{title}: {len(own)} operators"]
    texts += [f"{outside} of them in no scope"] if not chain and 0 < outside < len(own) else []
    texts += [f"{len(parameters)} parameters of {', '.join(_modules(parameters))}"] if parameters else []
    return ", ".join([*texts, *_lines(program.operators[i] for i in own)])


def _title(primitive: Primitive) -> str:
    return f"{primitive} ({primitive.at})"


def _parameters(program: Program, operators: Iterable[int]) -> list[str]:
    """Parameters that these operators read."""
    read = dict.fromkeys(source for i in operators for source, _ in program.operators[i].operands)
    return [program.placeholder(i).name for i in sorted(read) if program.operators[i].kind == "parameter"]


def _modules(parameters: Sequence[str]) -> list[str]:
    """The module around all of these parameters; where only the model is, the modules directly inside it."""
    paths = [folded(name).split(".")[:-1] or [name] for name in parameters]
    common = 0
    while all(len(path) > common for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    return list(dict.fromkeys(".".join(path[: max(common, 1)]) for path in paths))


def _lines(operators: Iterable[Operator]) -> list[str]:
    """Per file, the first and last line of the user's that made these operators."""
    found: dict[str, list[int]] = {}
    for op in operators:
        file, _, line = op.where.rpartition(":")
        if file and line.isdigit():
            found.setdefault(file, []).append(int(line))
    return [f"{file}:{min(lines)}" + (f"-{max(lines)}" if len(set(lines)) > 1 else "") for file, lines in found.items()]
