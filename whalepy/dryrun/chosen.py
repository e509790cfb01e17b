"""The stages that a search finds for a model, as annotations that force them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import nn

from whalepy.dryrun.blocks import Blocks, folded, module_of
from whalepy.dryrun.stages import Staging
from whalepy.dryrun.strategies import levels_of, only
from whalepy.dryrun.study import Study
from whalepy.dryrun.table import ModelTable
from whalepy.dryrun.tried import TIGHT, Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.planner.search import Choice, Limits, best_choices
from whalepy.primitives import Primitive, replicate, split, stage
from whalepy.primitives import cluster as cluster_scope


@dataclass(frozen=True)
class Surveyed:
    """A model whose blocks have been measured out for a cluster."""

    table: ModelTable
    paths: tuple[str, ...]
    """Of its blocks, in the order in which they run."""
    modules: Mapping[str, int]
    """Modules outside all blocks -> the place of the block that they run with, for those that run with one alone."""
    in_time: bool
    """Whether the loss can be computed in microbatches."""


def surveyed(model: nn.Module, study: Study, cluster: ClusterSpec) -> Surveyed:
    """What a search needs to know of a model; `model` is whole, `study` may be folded."""
    children = tuple(name for name, child in model.named_children() if any(True for _ in child.modules()))
    with folded(model, fold=False) as whole:
        paths = whole.paths or children
    known = study if study.blocks.paths else replace(study, blocks=Blocks(children), cuts={})
    table = ModelTable(known, cluster)
    return Surveyed(table, tuple(paths[k] for k in table.places), _modules(table), _in_time(study, cluster))


def _modules(table: ModelTable) -> dict[str, int]:
    program, found = table.study.program, dict[str, set[int]]()
    for op, node, block in zip(program.operators, program.nodes, table.turn_of, strict=True):
        path = module_of(node)
        if op.kind == "call" and path and table.study.blocks.of(path) < 0 and not _holds_blocks(path, table):
            found.setdefault(path, set()).add(block)
    last = {number: place for place, number in enumerate(table.ran[k] for k in table.order)}
    first = {table.ran[0]: 0}
    return {path: {**last, **first}[blocks.pop()] for path, blocks in found.items() if len(blocks) == 1}


def _holds_blocks(path: str, table: ModelTable) -> bool:
    return any(block.startswith(f"{path}.") for block in table.study.blocks.paths)


def _in_time(study: Study, cluster: ClusterSpec) -> bool:
    """Whether the model may be trained in microbatches: its loss is a sum over rows, and no statistics are of all."""
    if study.rows < 2 or any(way.kernel == "batch_statistics" for op in study.program.operators for way in op.options):
        return False
    one = only(cluster, {0})
    try:
        study.candidate(levels_of(1, 1), one, one.speeds(), 2)
    except PlanError:
        return False
    return True


def choices_of(found: Surveyed, cluster: ClusterSpec, options: Options, *, least: int = 1) -> list[Choice]:
    """The best ways to put the model on the cluster, in `least` stages or more, best first; none where nothing fits."""
    shares = options.shares if isinstance(options.shares, tuple) else None
    savings = [(options.zero or 0, options.recompute or "none")]
    if options.saves_freely:
        savings += [(0, "selective"), (0, "full")]
    limits = Limits(
        stages=options.stages,
        least_stages=least,
        chunks=parse_kind(options.schedule or DEFAULT).chunks or 1,
        replicate=options.replicate,
        split=options.split,
        microbatches=options.microbatches,
        equal=options.shares == "equal",
        shares=shares,
        in_time=found.in_time,
    )
    for filled in (TIGHT, 1.0):
        for one in savings:
            choices = best_choices(found.table, cluster, replace(limits, savings=(one,), filled=filled))
            if choices:
                return choices
    return []


def staging_of(found: Surveyed, choice: Choice, devices: int) -> Staging:
    """The annotations that put a model in these stages on these devices."""
    lists = tuple(tuple(d for unit in own for d in unit.devices) for own in choice.groups)
    plain = sum(lists, ()) == tuple(range(devices))
    outer: list[Primitive] = [] if plain else [cluster_scope(placement=[list(own) for own in lists])]
    if choice.copies > 1:
        outer.append(replicate(choice.copies, shares=tuple(map(float, choice.rows))))
    scopes: dict[str, Sequence[Primitive]] = {"": outer} if outer else {}
    bounds = [0, *accumulate(choice.sizes)]
    for a, b in pairwise(bounds):
        inside = [stage(), *([split(choice.way.split)] if choice.way.split > 1 else [])]
        scopes.update(dict.fromkeys(found.paths[a:b], inside))
        if choice.way.split > 1:
            scopes.update({path: inside for path, place in found.modules.items() if a <= place < b})
    return Staging(scopes, name_of(choice), flags_of(choice))


def name_of(choice: Choice) -> str:
    """`replicate 2 > 4 stages > split 2`."""
    outer = [f"replicate {choice.copies}"] if choice.copies > 1 else []
    inner = [f"split {choice.way.split}"] if choice.way.split > 1 else []
    return " > ".join([*outer, f"{len(choice.sizes)} stages", *inner])


def flags_of(choice: Choice) -> str:
    """The options that force it."""
    outer = [f"--replicate {choice.copies}"] if choice.copies > 1 else []
    inner = [f"--split {choice.way.split}"] if choice.way.split > 1 else []
    return " ".join([f"--stages {len(choice.sizes)}", *outer, *inner])
