"""What a forecast tells beside its plan: what each device adds, how much more would fit, and the model as a tree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from torch import nn

from whalepy.dryrun.blocks import module_of
from whalepy.dryrun.described import DescribedCandidate, modules_of_layers
from whalepy.dryrun.shares import curves_of
from whalepy.dryrun.tried import Tried
from whalepy.planner.balance import balance
from whalepy.planner.forecast import ModulePart
from whalepy.program.costs import hint
from whalepy.program.layout import Sharded

_MOST_ROWS = 1_000_000


def adds(best: Tried) -> dict[int, float | None]:
    """Per rank, the part of the throughput that would be lost without its device; None where replicas are several."""
    candidate, total = best.candidate, sum(best.rows)
    if candidate.replicas != len(best.ranks) or len(best.ranks) == 1:
        return dict.fromkeys(best.ranks)
    curves = curves_of(candidate, total)
    now = max(seconds(rows) for (seconds, _), rows in zip(curves, best.rows, strict=True))
    found: dict[int, float | None] = {}
    known: dict[Any, float] = {}
    for rank in best.ranks:
        kind = curves[candidate.replica_of(rank)]
        if kind in known:
            found[rank] = known[kind]
            continue
        others = [curve for replica, curve in enumerate(curves) if replica != candidate.replica_of(rank)]
        most = [filled.most_rows(1.0, total) for _, filled in others]
        rows = balance(total, [seconds for seconds, _ in others], most)
        if rows is None:  # without it the batch does not fit
            found[rank] = known[kind] = 1.0
            continue
        later = max(seconds(n) for (seconds, _), n in zip(others, rows, strict=True))
        found[rank] = known[kind] = 1 - now / later
    return found


def largest_batch(best: Tried) -> int:
    """The largest global batch that the memory of the devices holds with this strategy."""
    curves = curves_of(best.candidate, sum(best.rows))
    return sum(filled.most_rows(1.0, _MOST_ROWS) for _, filled in curves)


def longest_sequence(best: Tried, tokens: int | None) -> int | None:
    """The longest sequence that the memory of the devices holds with this plan; None where lengths are not free.

    Memory is a polynomial of the length, of second degree with attention scores: found through three lengths.
    """
    if tokens is None or best.verdict == "no":
        return None
    study, most = best.candidate.study, _positions(best.candidate.study.recipe.model)
    filled = [max(best.candidate.filled(rank, best.rows_of(rank)) for rank in best.ranks)]
    for times in (2, 4):
        longer = study.with_length(tokens, times * tokens)
        if longer is None:
            return None
        found = best.candidate
        again = longer.candidate(found.levels, found.cluster, found.cluster.speeds(), found.microbatches, found.savings)
        filled.append(max(again.filled(rank, best.rows_of(rank)) for rank in best.ranks))
    curve = _through(*filled)
    low, high = tokens, min(most or _MOST_TIMES * tokens, _MOST_TIMES * tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if curve(middle / tokens) <= 1 else (low, middle - 1)
    return low


_MOST_TIMES = 64


def _through(one: float, two: float, four: float) -> Callable[[float], float]:
    """The polynomial of second degree with these values at 1, 2 and 4; never falling."""
    bend = ((four - two) / 2 - (two - one)) / 3
    slope = two - one - 3 * bend
    return lambda x: max(one, one + slope * (x - 1) + bend * (x * x - 1))


def _positions(model: nn.Module) -> int | None:
    """The longest sequence that the model itself takes, where its configuration says so."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def ways_out(tried: Sequence[Tried], *, shares_forced: bool) -> tuple[str, ...]:
    """Flags that make the model fit where nothing does: plain descent, then a smaller batch."""
    found = [f"{plan.flags} --optimizer sgd".strip() for plan in tried if _fits_without_state(plan)][:1]
    batches = [(_batch_of_equal(plan) if shares_forced else largest_batch(plan), plan) for plan in tried[:3]]
    most, plan = max(batches, key=lambda pair: pair[0])
    if most >= plan.candidate.replicas:
        kept = re.sub(r" --shares \S+", " --shares equal" if shares_forced else "", plan.flags)
        count = plan.candidate.microbatches
        kept = kept if count * plan.candidate.replicas <= most else re.sub(r" --microbatches \d+", "", kept)
        found.append(f"{kept} --batch-size {most}".strip())
    return tuple(found)


def _batch_of_equal(plan: Tried) -> int:
    """The largest batch with equal shares."""
    curves = curves_of(plan.candidate, sum(plan.rows))
    return plan.candidate.replicas * min(filled.most_rows(1.0, _MOST_ROWS) for _, filled in curves)


def _fits_without_state(plan: Tried) -> bool:
    work = plan.candidate.work
    return all(plan.peak(r) - work(r, plan.rows_of(r)).optimizer <= plan.capacity(r) for r in plan.ranks)


def modules_of(best: Tried) -> tuple[ModulePart, ...]:
    """Every module with parameters or products, numbers in paths folded into `*`."""
    if isinstance(best.candidate, DescribedCandidate):
        return modules_of_layers(best.candidate.described)
    program, blocks = best.candidate.main.program, best.candidate.study.blocks
    parameters: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    members: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, dict[tuple[str, int], tuple[str, int, tuple[float, ...]]]] = defaultdict(dict)
    for i, op in enumerate(program.operators):
        if op.kind == "parameter":
            name = program.placeholder(i).name
            size = prod(hint(program.axes.size(axis), program.hints) for dim in program.dims[i][0] for axis in dim)
            times = blocks.repeats(name)
            for path in _with_parents(name.rpartition(".")[0]):
                parameters[_folded(path)] += size * times
                members[_folded(path)].add(path)
            for dim, shares in _cuts(best, name):
                whole = prod(hint(program.axes.size(axis), program.hints) for axis in program.dims[i][0][dim])
                splits[_folded(name.rpartition(".")[0])][_folded(name), dim] = (_folded(name), whole, shares)
        elif op.kind == "call":
            inner = module_of(program.nodes[i]) or ""
            for path in _with_parents(inner):
                flops[_folded(path)] += float(op.flops) * blocks.repeats(inner)
                members[_folded(path)].add(path)
    return tuple(
        ModulePart(
            path,
            round(sum(blocks.repeats(member) for member in members[path])),
            round(parameters[path]),
            flops[path],
            tuple(splits[path].values()),
        )
        for path in sorted(members)
    )


def _with_parents(path: str) -> Iterator[str]:
    """The path of a module and of all that it lies in; the model itself is the empty path."""
    yield ""
    parts = path.split(".") if path else []
    for k in range(len(parts)):
        yield ".".join(parts[: k + 1])


def _folded(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _cuts(best: Tried, name: str) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Dims of a parameter that a level cuts, with the shares."""
    decisions = best.candidate.main.decisions
    for kind in decisions.stored[name]:
        if isinstance(kind, Sharded):
            yield kind.place.dim, decisions.cuts[kind.cut].weights
