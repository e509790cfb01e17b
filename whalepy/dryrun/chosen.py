"""The stages that a search finds for a model, as annotations that force them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise

from whalepy.dryrun.blocks import Blocks, module_of
from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.shares import equal_rows
from whalepy.dryrun.staged import Staged
from whalepy.dryrun.stages import Staging, check_degrees
from whalepy.dryrun.strategies import levels_of, only
from whalepy.dryrun.study import Savings, Study
from whalepy.dryrun.table import ModelTable
from whalepy.dryrun.tried import TIGHT, Balance, Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import Way
from whalepy.planner.forecast import Alternative, Forecast
from whalepy.planner.form import Limits, Width
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.planner.search import Choice, Search
from whalepy.planner.shares import round_shares
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.whale import whale_cut
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

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """Of each block with a few rows."""
        works = self.table.works(Way(), self.table.some)
        flops = [float(sum(event.flops for event in work.forward)) for work in works]
        return tuple(flops[k] for k in self.table.order)


def surveyed(study: Study, cluster: ClusterSpec, split: int | None = None) -> Surveyed:
    """What a search needs to know of a model, which may be folded. One without lists is cut between its children.

    `split`: the only degree that it will ask for; None: any.
    """
    known = study
    if not study.blocks.paths:
        blocks = Blocks(tuple(name for name, _ in study.recipe.model.named_children()) or ("",))
        known = replace(study, blocks=blocks, cuts={})
    table = ModelTable(known, cluster, _in_time(study, cluster), split)
    paths = known.blocks.whole or known.blocks.paths
    places = tuple(paths[k] for k in table.places)
    return Surveyed(table, places, _modules(table))


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


def choices_of(found: Surveyed, cluster: ClusterSpec, options: Options) -> list[Choice]:
    """The best ways to put the model on the cluster, best first; none where nothing fits."""
    shares = options.shares if isinstance(options.shares, tuple) else None
    savings = [(options.zero or 0, options.recompute or "none")]
    if options.saves_freely:
        savings += [(0, "selective"), (0, "full")]
    limits = Limits(
        stages=options.stages,
        chunks=parse_kind(options.schedule or DEFAULT).chunks or 1,
        replicate=options.replicate,
        split=options.split,
        microbatches=options.microbatches,
        equal="equal" in (options.shares, options.balance),
        shares=shares,
        in_time=found.table.in_time,
        widths=options.widths,
        unlike=options.balance == "exact",
    )
    costs = StageCosts(found.table, cluster)
    for filled in (TIGHT, 1.0, *([_ANY] if options.stages else [])):
        for one in savings if filled <= 1 else savings[:1]:
            choices = Search(costs, replace(limits, savings=(one,), filled=filled)).found()
            if choices:
                return choices
    return []


_ANY = 2.0**20
"""Of forced stages it is told what is missing: as if memories were so many times larger."""


@dataclass(frozen=True)
class Ways:
    """The best ways that were found to put a model in stages, best first."""

    found: Surveyed
    choices: tuple[Choice, ...]
    cluster: ClusterSpec
    options: Options

    def staged(self, choice: Choice) -> tuple[Staged, Options]:
        """The stages of one of them, and the options that they are run with."""
        balance = self.options.balance
        made = staging_of(self.found, choice, len(self.cluster.devices), self.options)
        if balance != "exact":
            name, flags = f"{made.name} by {_BALANCES[balance]}", f"{made.flags} --balance {balance}"
            made = replace(made, name=name, flags=flags)
        return Staged.made(made), as_chosen(self.options, choice)


def forced(study: Study, cluster: ClusterSpec, options: Options) -> Ways:
    """The stages that are asked for, in the best ways to have them. Raises PlanError where blocks or devices lack."""
    found = surveyed(study, cluster, options.split)
    model, count = study.recipe.model, options.stages or 1
    if count > len(found.paths):
        paths = ", ".join(found.paths[:3]) + (", ..." if len(found.paths) > 3 else "")
        asked = f"--stages {count}" if options.widths is None else f"--widths of {count} stages"
        raise PlanError(
            f"{asked}, but {type(model).__name__} has {len(found.paths)} blocks to cut between: {paths}",
            fix=f"choose at most {len(found.paths)} stages, or annotate the model with whalepy.stage()",
        )
    check_degrees(options, len(cluster.devices))
    choices = choices_of(found, cluster, options)
    if not choices:
        raise PlanError(
            f"{count} stages cannot be met with what else is forced",
            fix="leave out --microbatches, --replicate, --split or --shares, or give other --widths",
        )
    if options.balance != "exact":
        choices = [_balanced(found, choices[0], cluster, options.balance)]
    return Ways(found, tuple(choices), cluster, options)


_BALANCES = {"whale": "Whale's cut", "equal": "number of blocks"}


def _balanced(found: Surveyed, choice: Choice, cluster: ClusterSpec, balance: Balance) -> Choice:
    """The same with the rows and the cut of a baseline."""
    count = len(choice.sizes)
    if balance == "equal":
        return replace(choice, sizes=equal_rows(len(found.paths), count))
    if balance == "whale":
        speeds = cluster.speeds()
        paces = [[sum(speeds[d] for d in unit.devices) for unit in group] for group in choice.groups]
        sizes = whale_cut(found.flops, [sum(paces[k % len(paces)]) for k in range(count)])
        copies = [sum(own) for own in zip(*paces, strict=True)]
        rows = round_shares(found.table.rows, copies, at_least_one=True)
        return replace(choice, sizes=tuple(sizes), rows=rows, shares=tuple(copies))
    return choice


def as_chosen(options: Options, choice: Choice) -> Options:
    """What stages that were found are run with."""
    count = options.microbatches or choice.microbatches
    return replace(options, stages=len(choice.sizes), microbatches=count, recompute=_recompute(choice.recompute))


def _recompute(text: str) -> Recompute | None:
    return None if text == "none" else text  # type: ignore[return-value]


def estimates_of(choices: Sequence[Choice], cluster: ClusterSpec, options: Options) -> tuple[Alternative, ...]:
    """What the search expects of each."""
    return tuple(_estimate(choice, cluster, options) for choice in choices)


def _estimate(choice: Choice, cluster: ClusterSpec, options: Options) -> Alternative:
    capacity = cluster.devices[choice.tightest].memory_bytes
    savings = Savings(choice.zero, _recompute(choice.recompute) or "none")
    count = f"{choice.microbatches} microbatch{'es' if choice.microbatches > 1 else ''}"
    idle = len(cluster.devices) - choice.devices
    parts = [name_of(choice), *savings.words, count, *([f"{idle} idle"] if idle else []), "estimated"]
    flags = [flags_of(choice, options), f"--microbatches {choice.microbatches}", *savings.flags]
    return Alternative(
        strategy=", ".join(parts),
        step_time_s=choice.step_s,
        verdict="tight" if choice.filled > TIGHT else "fits",
        tightest=choice.tightest,
        peak_memory_bytes=round(choice.filled * capacity),
        memory_capacity_bytes=capacity,
        missing_bytes={},
        flags=" ".join(flags),
        not_runnable=savings.words,
    )


def with_estimates(forecast: Forecast, estimates: Sequence[Alternative]) -> Forecast:
    """The same with what was estimated and not played, for other numbers of stages than those that were."""
    first, *played = forecast.alternatives
    staged = len(forecast.stages) > 1
    known = {one.strategy.split(",")[0] for one in forecast.alternatives}
    more = [one for one in estimates if one.strategy.split(",")[0] not in known]
    more = [one for one in more if staged or "stages" in one.strategy]
    others = sorted([*played, *more], key=lambda one: (one.verdict == "no", one.step_time_s))
    return replace(forecast, alternatives=(first, *others))


def staging_of(found: Surveyed, choice: Choice, devices: int, options: Options) -> Staging:
    """The annotations that put a model in these stages on these devices."""
    return Staging(scopes_for(found, choice, devices), name_of(choice), flags_of(choice, options))


def scopes_for(found: Surveyed, choice: Choice, devices: int) -> dict[str, Sequence[Primitive]]:
    """By module path, the scopes that put a model on these devices as chosen."""
    lists = tuple(tuple(d for unit in own for d in unit.devices) for own in choice.groups)
    plain = sum(lists, ()) == tuple(range(devices))
    outer: list[Primitive] = [] if plain else [cluster_scope(placement=[list(own) for own in lists])]
    if choice.copies > 1:
        outer.append(replicate(choice.copies, shares=choice.shares))
    inners = [_inside(width) for width in choice.widths]
    if len(choice.sizes) == 1:
        (inner,) = inners
        return {"": [*outer, *inner]} if outer or inner else {}
    scopes: dict[str, Sequence[Primitive]] = {"": outer} if outer else {}
    bounds = [0, *accumulate(choice.sizes)]
    for k, (a, b) in enumerate(pairwise(bounds)):
        inner = inners[k % len(inners)]
        own = [stage(), *inner]
        scopes.update(dict.fromkeys(found.paths[a:b], own))
        if inner:
            scopes.update({path: own for path, place in found.modules.items() if a <= place < b})
    return scopes


def _inside(width: Width) -> list[Primitive]:
    return [kind(degree) for kind, degree in ((replicate, width.replicate), (split, width.split)) if degree > 1]


def name_of(choice: Choice) -> str:
    """`replicate 2 > 4 stages > split 2`, or `2 stages of 6 and 2x2 devices`: their parts of the rows, each split."""
    if is_wide(choice):
        runs = [f"{text} ({count} times)" if count > 1 else text for text, count in _runs(choice)]
        return (
            f"{len(choice.sizes)} stages of {' and '.join(filter(None, (' then '.join(runs[:-1]), runs[-1])))} devices"
        )
    outer = [f"replicate {choice.copies}"] if choice.copies > 1 else []
    inner = [f"split {choice.split}"] if choice.split > 1 else []
    middle = [f"{len(choice.sizes)} stages"] if len(choice.sizes) > 1 else []
    return " > ".join([*outer, *middle, *inner]) or "one device"


def is_wide(choice: Choice) -> bool:
    """Whether some stage has parts of its rows, which numbers of stages, copies and splits do not say."""
    return choice.unlike or choice.widths[0].replicate > 1


def _runs(choice: Choice) -> list[tuple[str, int]]:
    """The widths of the groups of devices, and of how many neighbours each is that."""
    return [(str(width), len(list(own))) for width, own in groupby(choice.widths)]


def flags_of(choice: Choice, options: Options) -> str:
    """The options that force it, with the shares that were forced."""
    if is_wide(choice):
        return "--widths " + ",".join(f"{count}*{text}" if count > 1 else text for text, count in _runs(choice))
    flags = f"--stages {len(choice.sizes)} --replicate {choice.copies} --split {choice.split}"
    if options.shares is None:
        return flags
    weights = options.shares if options.shares == "equal" else ":".join(f"{weight:g}" for weight in options.shares)
    return f"{flags} --shares {weights}"
