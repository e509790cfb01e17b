"""Stages for a model without annotations: its blocks in neighbouring groups, as even in time as they can be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from whalepy.dryrun.blocks import Blocks, module_of
from whalepy.dryrun.shares import equal_rows
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.planner.whale import whale_cut
from whalepy.primitives import Primitive, replicate, split, stage
from whalepy.program.taskgraphs import turns


@dataclass(frozen=True)
class Staging:
    """What is put on the modules of a model so that it runs in stages."""

    scopes: Mapping[str, Sequence[Primitive]]
    name: str
    """`replicate 2 > 2 stages`."""
    flags: str

    @property
    def text(self) -> str:
        """Python that does the same."""
        lines: list[str] = []
        known: dict[Primitive, str] = {}
        for chain in self.scopes.values():
            for primitive in chain:
                if primitive not in known and primitive.kind == "stage":
                    known[primitive] = f"stage_{len(known)}"
        lines += [f"{name} = whalepy.stage()" for name in known.values()]
        splits = dict.fromkeys(p for chain in self.scopes.values() for p in chain if p.kind == "split")
        known |= {p: f"split_{k}" for k, p in enumerate(splits)}
        lines += [f"{known[p]} = whalepy.{p!r}" for p in splits]
        lines.append("whalepy.annotate(model, {")
        for path, chain in self.scopes.items():
            named = [known.get(p, f"whalepy.{p!r}") for p in chain]
            lines.append(f'    "{path}": {named[0] if len(named) == 1 else "[" + ", ".join(named) + "]"},')
        return "\n".join([*lines, "})"])


@dataclass(frozen=True)
class Block:
    """A module that a stage is made of, with the FLOPs of all that runs from it up to the next one."""

    path: str
    flops: float


def staging(options: Options, blocks: Sequence[Block], cluster: ClusterSpec, model: str) -> Staging:
    """The blocks in as many stages as asked for. Raises PlanError where blocks or devices are too few for them."""
    count = options.stages or 1
    if count > len(blocks):
        paths = ", ".join(block.path for block in blocks[:3]) + (", ..." if len(blocks) > 3 else "")
        raise PlanError(
            f"--stages {count}, but {model} has {len(blocks)} blocks to cut between: {paths}",
            fix=f"choose at most {len(blocks)} stages, or annotate the model with whalepy.stage()",
        )
    degrees = degrees_of(options, len(cluster.devices))
    groups = count // degrees.chunks
    each = len(cluster.devices) // groups
    speeds = cluster.speeds()
    pace = [sum(speeds[g * each : (g + 1) * each]) for g in range(groups)]
    sizes = _cut(options, [block.flops for block in blocks], [pace[k % groups] for k in range(count)])
    shares = "equal" if options.balance == "equal" else options.shares
    shares = (1.0,) * degrees.replicate if shares == "equal" else shares
    outer = replicate(degrees.replicate, shares=shares) if degrees.replicate > 1 else None
    scopes: dict[str, Sequence[Primitive]] = {} if outer is None else {"": [outer]}
    inside = [split(degrees.split)] if degrees.split > 1 else []
    bounds = [0, *accumulate(sizes)]
    for a, b in pairwise(bounds):
        own = stage()
        scopes.update({block.path: [own, *inside] for block in blocks[a:b]})
    name, flags = _name(degrees, count), _flags(degrees, count)
    if options.balance != "exact":
        name, flags = f"{name} by {_BALANCES[options.balance]}", f"{flags} --balance {options.balance}"
    return Staging(scopes, name, flags)


_BALANCES = {"whale": "Whale's cut", "equal": "number of blocks"}


def _cut(options: Options, flops: Sequence[float], paces: Sequence[float]) -> list[int]:
    """How many blocks each stage takes."""
    if options.balance == "equal":
        return list(equal_rows(len(flops), len(paces)))
    return (whale_cut if options.balance == "whale" else cut_evenly)(flops, paces)


@dataclass(frozen=True)
class Degrees:
    """How the devices are shared out."""

    replicate: int
    split: int
    chunks: int
    """Stages per group of devices."""


def degrees_of(options: Options, devices: int) -> Degrees:
    """The degrees around and inside the stages; what is forced stays.

    Without a forced degree of replicate it is what the devices allow: 1 where they leave a remainder, which the planner
    then gives to the slowest stages. Raises PlanError where the devices are too few, or others than asked for.
    """
    count = options.stages or 1
    kind = parse_kind(options.schedule or DEFAULT)
    chunks = kind.chunks or 1
    if count % chunks:
        raise PlanError(
            f"--schedule {kind} wants a multiple of {chunks} stages, not {count}",
            fix=f"choose --stages {max(count // chunks, 1) * chunks}",
        )
    inner = count // chunks * (options.split or 1)
    copies = options.replicate or (devices // inner if devices % inner == 0 else 1)
    needed = inner * copies
    forced = options.replicate is not None and needed != devices
    if needed > devices or forced:
        asked = " x ".join(str(d) for d in (count // chunks, options.replicate, options.split) if d)
        raise PlanError(
            f"stages and degrees {asked} cannot be met on {devices} devices",
            fix="groups of stages, times replicate, times split must be the number of devices",
        )
    if options.shares not in (None, "equal") and len(options.shares or ()) != copies:
        raise PlanError(
            f"{len(options.shares or ())} shares for {copies} replicas", fix="give one weight per replica, such as 3:1"
        )
    return Degrees(copies, options.split or 1, chunks)


def _name(degrees: Degrees, count: int) -> str:
    outer = [f"replicate {degrees.replicate}"] if degrees.replicate > 1 else []
    inner = [f"split {degrees.split}"] if degrees.split > 1 else []
    return " > ".join([*outer, f"{count} stages", *inner])


def _flags(degrees: Degrees, count: int) -> str:
    outer = [f"--replicate {degrees.replicate}"] if degrees.replicate > 1 else []
    inner = [f"--split {degrees.split}"] if degrees.split > 1 else []
    return " ".join([f"--stages {count}", *outer, *inner])


# -- blocks and what they take


@dataclass(frozen=True)
class Weighed:
    """The FLOPs of the blocks that were run, by number in the order in which they run."""

    blocks: Blocks
    flops: Mapping[int, float]


def flops_of_blocks(model: nn.Module, study: Study, blocks: Blocks) -> Weighed:
    """The FLOPs of each block of a study, which may be folded.

    Operators outside all blocks count for the one that runs before them, as stages take them; a model without lists of
    modules is cut between its children.
    """
    children = tuple(name for name, _ in model.named_children())
    known = blocks if blocks.paths else Blocks(children)
    flops: dict[int, float] = {}
    at, early = -1, 0.0
    order = turns(study.program)
    for i in sorted(range(len(order)), key=order.__getitem__):
        op = study.program.operators[i]
        if op.kind != "call":
            continue
        found = known.of(module_of(study.program.nodes[i]) or "")
        at = found if found >= 0 else at
        early += float(op.flops) if at < 0 else 0.0
        if at >= 0:
            flops[at] = flops.get(at, 0.0) + float(op.flops)
    for first in list(flops)[:1]:
        flops[first] += early
    return Weighed(known, flops)


def unfolded(weighed: Weighed) -> list[Block]:
    """The blocks of the whole model in the order in which they run."""
    known = weighed.blocks
    paths = known.whole or known.paths
    places: dict[int, list[int]] = {}
    for k, number in enumerate(known.stand_ins):
        places.setdefault(number, []).append(k)
    found = [(k, flops) for number, flops in weighed.flops.items() for k in places[number]]
    return [Block(paths[k], flops) for k, flops in (sorted(found) if known.folds else found)]


def cut_evenly(weights: Sequence[float], paces: Sequence[float]) -> list[int]:
    """How many neighbours each part takes, one at least, so that the part that takes longest takes least.

    A part of weight w takes w over its pace. Ties: the least sum of squares, then the later parts take more.
    """
    total = [0.0, *accumulate(weights)]
    count = len(weights)
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for k, pace in enumerate(paces):
        row: dict[int, tuple[float, float, int]] = {}
        for stop in range(k + 1, count - (len(paces) - k - 1) + 1):
            ways: list[tuple[float, float, int]] = []
            for start, (slowest, squares, _) in best[k].items():
                if start < stop:
                    own = (total[stop] - total[start]) / pace
                    ways.append((max(slowest, own), squares + own * own, start))
            row[stop] = min(ways)
        best.append(row)
    sizes: list[int] = []
    at = count
    for row in reversed(best[1:]):
        start = row[at][2]
        sizes.append(at - start)
        at = start
    return sizes[::-1]
