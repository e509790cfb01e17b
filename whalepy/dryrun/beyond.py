"""What a forecast tells beside its plan: what each device adds, what would fit, and the model as a tree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import prod

from whalepy.dryrun.blocks import module_of
from whalepy.dryrun.described import DescribedCandidate, modules_of_layers
from whalepy.dryrun.pipeline import PipelineCandidate
from whalepy.dryrun.room import largest_batch
from whalepy.dryrun.shares import best_rows
from whalepy.dryrun.strategies import levels_of, only
from whalepy.dryrun.tried import Tried
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.planner.decide import Decisions
from whalepy.planner.forecast import ModulePart
from whalepy.program.costs import hint
from whalepy.program.layout import Sharded


def adds(best: Tried) -> dict[int, float | None]:
    """Per rank, the part of the throughput that the others, planned anew, lose without its device.

    Less than 0 where they are faster without it. None where it was not tried: where ranks share a replica, or the
    annotations of the model leave no other number of devices.
    """
    candidate = best.candidate
    if candidate.replicas != len(best.ranks) or len(best.ranks) == 1 or best.verdict == "no":
        return dict.fromkeys(best.ranks)
    kinds = {rank: candidate.kind_of(candidate.replica_of(rank)) for rank in best.ranks}
    first = {kind: rank for rank, kind in reversed(kinds.items())}
    known = {kind: _added(best, rank) for kind, rank in first.items()}
    return {rank: known[kind] for rank, kind in kinds.items()}


def adds_in_stages(best: Tried, plan: Callable[[ClusterSpec], Tried | None]) -> dict[int, float | None]:
    """The same for a pipeline, of which `plan` makes another one for other devices.

    Devices of one kind in nodes of one kind are tried once.
    """
    cluster = best.candidate.cluster
    if best.verdict == "no" or len(cluster.devices) == 1:
        return dict.fromkeys(best.ranks)
    everything = set(range(len(cluster.devices)))
    forms = [(node.link, tuple(_kind_of(device) for device in node.devices)) for node in cluster.nodes]
    known: dict[Hashable, float | None] = {}
    found: dict[int, float | None] = {}
    for rank in best.ranks:
        device = best.candidate.device(rank)
        kind = forms[device.node], _kind_of(device)
        if kind not in known:
            without = _planned(plan, only(cluster, everything - {device.index}))
            known[kind] = None if without is None else _lost(best, without)
        found[rank] = known[kind]
    return found


def _kind_of(device: Device) -> Hashable:
    return device.profile, device.speed, device.memory_bytes


def _planned(plan: Callable[[ClusterSpec], Tried | None], cluster: ClusterSpec) -> Tried | None:
    try:
        return plan(cluster)
    except WhaleError:
        return None


def _lost(best: Tried, without: Tried) -> float:
    """The part of the throughput that is lost with another plan."""
    return 1.0 if without.verdict == "no" else 1 - best.step_s / without.step_s


def _added(best: Tried, rank: int) -> float | None:
    found, study = best.candidate, best.candidate.study
    others = only(found.cluster, set(range(len(found.cluster.devices))) - {found.device_of[rank]})
    levels = None if found.levels is None else levels_of(len(others.devices), 1)
    try:
        candidate = study.candidate(levels, others, others.speeds(), found.microbatches, found.savings)
    except WhaleError:
        return None
    rows = best_rows(candidate, study.rows)
    without = Tried(candidate, rows, "", "", candidate.played(rows))
    return _lost(best, without)


def ways_out(tried: Sequence[Tried], *, shares_forced: bool) -> tuple[str, ...]:
    """Flags that make the model fit where nothing does: plain descent, then a smaller batch."""
    found = [f"{plan.flags} --optimizer sgd".strip() for plan in tried if _fits_without_state(plan)][:1]
    batches = [(largest_batch(plan, 1.0, equal=shares_forced), plan) for plan in tried[:3]]
    most, plan = max(batches, key=lambda pair: pair[0])
    if most >= plan.candidate.replicas:
        kept = re.sub(r" --shares \S+", " --shares equal" if shares_forced else "", plan.flags)
        count = plan.candidate.microbatches
        kept = kept if count <= most else re.sub(r" --microbatches \d+", "", kept)
        found.append(f"{kept} --batch-size {most}".strip())
    return tuple(found)


def _fits_without_state(plan: Tried) -> bool:
    work = plan.candidate.work
    return all(plan.peak(r) - work(r, plan.rows_of(r)).optimizer <= plan.capacity(r) for r in plan.ranks)


def modules_of(best: Tried) -> tuple[ModulePart, ...]:
    """Every module with parameters or products, numbers in paths folded into `*`."""
    if isinstance(best.candidate, DescribedCandidate):
        return modules_of_layers(best.candidate.described)
    candidate = best.candidate
    parts = candidate.stages if isinstance(candidate, PipelineCandidate) else (candidate.main,)
    program = candidate.study.program if len(parts) > 1 else candidate.main.program
    blocks = candidate.study.blocks
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
            for dim, shares in _cuts([part.decisions for part in parts], name):
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


def _cuts(parts: Sequence[Decisions], name: str) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Dims of a parameter that a level cuts, with the shares, in the first stage that reads it."""
    decisions = next((part for part in parts if name in part.stored), None)
    for kind in () if decisions is None else decisions.stored[name]:
        if decisions is not None and isinstance(kind, Sharded):
            yield kind.place.dim, decisions.cuts[kind.cut].weights
