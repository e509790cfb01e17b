"""Why a program runs as it does: along what each split scope was cut, and what every device computes whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

from whalepy.planner.decide import Decisions
from whalepy.planner.mesh import Chain, Mesh, arrange
from whalepy.primitives import Primitive, scope_by_id
from whalepy.program.analysis import Program
from whalepy.program.layout import Layout, Operator, Sharded, Type, result_type
from whalepy.rewrite.crossing import input_layout, read_layout
from whalepy.rewrite.printing import bytes_text, level_names


def explain_text(program: Program, decisions: Decisions, chains: Sequence[Chain]) -> str:
    """A line per level of each split scope with its axis classes, most used first; then a line per operator that runs
    whole on every device for want of a rule, or of a way to cut it along the axis by which its operand is sharded.

    Equal operators of one line of the user's are folded; bytes are those of the results, at the example's sizes.
    """
    mesh = arrange(chains, prod(decisions.mesh))
    lines = [*_cuts(program, decisions, mesh), *_whole(program, decisions, level_names(chains, prod(mesh.sizes)))]
    return "\n".join(lines)


# -- along what


def _cuts(program: Program, decisions: Decisions, mesh: Mesh) -> Iterator[str]:
    for level, size in enumerate(mesh.sizes):
        used: dict[Primitive, Counter[str]] = {}
        for op, modes in zip(program.operators, decisions.modes, strict=True):
            owner = mesh.owners[tuple(map(scope_by_id, op.scope))][level] if op.kind == "call" else None
            if owner is None or owner.kind != "split" or size == 1:
                continue
            option = modes[level].option
            used.setdefault(owner, Counter()).update([] if option is None else [program.classes[option.axis]])
        for owner, classes in used.items():
            along = ", ".join(name for name, _ in classes.most_common()) or "nothing"
            yield f"{owner} ({owner.at}) on level {level} is cut along {along}"


# -- what runs whole


def _whole(program: Program, decisions: Decisions, levels: Sequence[str]) -> Iterator[str]:
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    layouts = _layouts(program, decisions)
    for i, op in enumerate(program.operators):
        for level, size in enumerate(decisions.mesh):
            reason = _reason(program, layouts, decisions, i, level) if op.kind == "call" and size > 1 else None
            if reason is not None:
                key = (op.target, op.where, f"on level {level} {levels[level]}: {reason}")
                counts[key] += 1
                sizes[key] += sum(op.result_bytes)
    for key in sorted(counts, key=lambda k: (-sizes[k], k)):
        target, where, reason = key
        times = f" x{counts[key]}" if counts[key] > 1 else ""
        place = f" ({where})" if where else ""
        yield f"{target}{times}{place} runs whole, {bytes_text(sizes[key])}, {reason}"


Layouts = dict[tuple[int, int], Layout]


def _layouts(program: Program, decisions: Decisions) -> Layouts:
    """The layout of every value where it is made."""
    found: Layouts = {}
    for i, op in enumerate(program.operators):
        for r in range(len(op.result_grad)):
            if op.kind == "parameter":
                found[i, r] = decisions.read[program.placeholder(i).name]
            elif op.kind == "input":
                found[i, r] = input_layout(program, decisions, i)
            elif op.kind == "received":
                found[i, r] = read_layout(program, decisions, i)
            else:
                found[i, r] = tuple(result_type(op, mode, r) for mode in decisions.modes[i])
    return found


def _reason(program: Program, layouts: Layouts, decisions: Decisions, i: int, level: int) -> str | None:
    """Why an operator runs whole on a level although it meets sharded values; None where it does not, or by choice."""
    op = program.operators[i]
    if decisions.modes[i][level].kind != "R":
        return None
    if not op.has_rule:
        return "it has no rule" if op.operands else None
    cut = [(k, layouts[key][level]) for k, key in enumerate(op.operands)]
    if any(isinstance(kind, Sharded) and not _has_way(op, k, kind) for k, kind in cut):
        return "it cannot be cut along the axis by which its operand is sharded"
    return None


def _has_way(op: Operator, operand: int, kind: Type) -> bool:
    return any(isinstance(kind, Sharded) and way.inputs[operand] == kind.place for way in op.options)
