"""The answer of a dry run: the plan chosen for a model and a cluster, what it would do, and what else was tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from whalepy.dryrun.beyond import adds, largest_batch, modules_of, ways_out
from whalepy.dryrun.shares import best_rows, enough_microbatches, equal_rows, forced_rows
from whalepy.dryrun.strategies import annotation_text, is_free, levels_of, parts_of, strategies
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.forecast import (
    Alternative,
    Breakdown,
    DeviceForecast,
    Forecast,
    Held,
    LinkForecast,
    StageForecast,
    Subject,
)
from whalepy.planner.plan import Plan
from whalepy.primitives import Primitive

Progress = Callable[[str], None]


def answer(
    study: Study, model: nn.Module, cluster: ClusterSpec, options: Options, subject: Subject, progress: Progress
) -> tuple[Forecast, Plan]:
    """The best plan under the options, and its forecast. Raises PlanError where the options cannot be met."""
    tried: list[Tried] = []
    for levels, strategy, flags in strategies(model, cluster, options):
        progress(strategy)
        try:
            tried.extend(_tried(study, cluster, levels, strategy, flags, options))
        except AnnotationError:
            if options.split is not None or options.replicate is not None:
                raise
    if not tried:
        raise PlanError("no strategy fits these options", fix="give degrees whose product is the number of devices")
    for part, name in parts_of(cluster) if is_free(model, options) else ():
        progress(f"{name} alone")
        levels = levels_of(len(part.devices), 1)
        tried.extend(_tried(study, part, levels, f"{name} alone", "", replace(options, shares=None)))
    own = [t for t in tried if t.candidate.cluster is cluster]
    best = min(own, key=lambda t: t.order)
    baseline = _equal(study, best, own)
    ranked = [best, *sorted((t for t in tried if t is not best), key=lambda t: t.order)]
    return _forecast(study, best, baseline, ranked, subject), _saved(best)


def _tried(
    study: Study,
    cluster: ClusterSpec,
    levels: tuple[Primitive, ...] | None,
    strategy: str,
    flags: str,
    options: Options,
) -> list[Tried]:
    """The strategy with the best shares, and with equal ones."""
    found = _with_shares(study, cluster, levels, strategy, flags, options, options.microbatches or 1)
    if options.microbatches is None and all(tried.verdict == "no" for tried in found):
        count = min(enough_microbatches(tried) for tried in found)
        if 1 < count <= max(found[0].rows):
            try:
                found += _with_shares(study, cluster, levels, strategy, flags, options, count)
            except PlanError:  # the loss is no sum over rows
                return found
    return found


def _with_shares(
    study: Study,
    cluster: ClusterSpec,
    levels: tuple[Primitive, ...] | None,
    strategy: str,
    flags: str,
    options: Options,
    microbatches: int,
) -> list[Tried]:
    candidate = study.candidate(levels, cluster, cluster.speeds(), microbatches)
    if options.shares is not None:
        chosen = [forced_rows(candidate, study.rows, options.shares)]
    else:
        chosen = list(dict.fromkeys((best_rows(candidate, study.rows), equal_rows(study.rows, candidate.replicas))))
    found: list[Tried] = []
    for rows in chosen:
        shares = ":".join(map(str, rows))
        parts = [strategy, f"shares {shares}" if len(rows) > 1 else ""]
        parts.append(f"{microbatches} microbatches" if microbatches > 1 else "")
        force = [flags, f"--shares {shares}" if len(rows) > 1 else ""]
        force.append(f"--microbatches {microbatches}" if microbatches > 1 else "")
        text = " ".join(filter(None, force)) if flags else ""
        found.append(Tried(candidate, rows, ", ".join(filter(None, parts)), text, candidate.played(rows)))
    return found


def _equal(study: Study, best: Tried, tried: Sequence[Tried]) -> Tried:
    """The same cluster with equal shares and no split, as DistributedDataParallel would use it."""
    rows = equal_rows(study.rows, len(best.candidate.cluster.devices))
    for other in tried:
        if other.rows == rows:
            return other
    cluster = best.candidate.cluster
    levels = None if best.candidate.levels is None else levels_of(len(cluster.devices), 1)
    candidate = study.candidate(levels, cluster, cluster.speeds(), 1)
    rows = equal_rows(study.rows, candidate.replicas)
    return Tried(candidate, rows, "equal shares", "", candidate.played(rows))


def _saved(best: Tried) -> Plan:
    """The plan with its rows as the weights of default shares."""
    candidate = best.candidate
    levels = tuple((level.kind, level.degree) for level in candidate.levels or ())
    weights = [float(best.rows[candidate.replica_of(rank)]) for rank in candidate.plan.rank_of]
    if len(best.rows) == 1 or not any(weights):
        return replace(candidate.plan, annotation=levels)
    return replace(candidate.again([weight / max(weights) for weight in weights]), annotation=levels)


def _forecast(study: Study, best: Tried, baseline: Tried, ranked: Sequence[Tried], subject: Subject) -> Forecast:
    played, added = best.played, adds(best)
    bottleneck = max(best.ranks, key=lambda rank: played.tracks[rank].busy_s)
    return Forecast(
        subject=subject,
        strategy=best.strategy,
        verdict=best.verdict,
        step_time_s=best.step_s,
        mfu=_mfu(best),
        equal_shares_step_time_s=baseline.step_s,
        bound=_bound(baseline),
        microbatches=best.candidate.plan.microbatches,
        schedule="none",
        bottleneck=bottleneck,
        tightest=best.tightest,
        devices=tuple(_device(best, rank, added[rank]) for rank in best.ranks),
        links=_links(best),
        stages=(_stage(study, best, subject),),
        breakdown=_breakdown(best, bottleneck),
        alternatives=tuple(_alternative(other) for other in ranked),
        assumptions=(*best.candidate.cluster.assumptions, *ASSUMPTIONS),
        annotations=annotation_text(best.candidate.levels or ()),
        modules=modules_of(best),
        largest_batch=largest_batch(best),
        ways_out=ways_out(ranked) if best.verdict == "no" else (),
        equal_shares_missing_bytes=baseline.missing,
    )


ASSUMPTIONS = (
    "gradient collectives run after the backward pass",
    "long messages reach 80 % of the bandwidth of a link",
)


def _mfu(best: Tried) -> float:
    flops = sum(best.candidate.work(rank, best.rows_of(rank)).flops for rank in best.ranks)
    dtype = _dtype(best)
    devices = [best.candidate.cost(rank).device for rank in best.ranks]
    peak = sum(device.profile.sheet_rate(dtype) * device.speed for device in devices)
    return flops / (peak * best.step_s)


def _dtype(best: Tried) -> str:
    events = best.candidate.work(best.ranks[0], max(best.rows)).events
    return max(events, key=lambda event: event.flops).dtype


def _bound(baseline: Tried) -> float:
    """Perfect balance and nothing to wait for, over the step with equal shares."""
    busy = [baseline.played.tracks[rank].busy_s for rank in baseline.ranks]
    return baseline.step_s * sum(1 / seconds for seconds in busy) / len(busy) if min(busy) > 0 else 1.0


def _device(best: Tried, rank: int, added: float | None) -> DeviceForecast:
    candidate, track = best.candidate, best.played.tracks[rank]
    device = candidate.cluster.devices[candidate.device_of[rank]]
    return DeviceForecast(
        rank=rank,
        type=device.type,
        node=device.node,
        stage=0,
        coordinates=candidate.plan.coordinates_of(rank),
        batch_share=best.rows_of(rank),
        peak_memory_bytes=best.peak(rank),
        memory_capacity_bytes=device.memory_bytes,
        busy_s=track.busy_s,
        held=_held(best, rank),
        memory=tuple((at, size + candidate.cost(rank).runtime_bytes) for at, size in _thinned(track.memory)),
        spans=tuple(track.spans),
        adds=added,
    )


_POINTS = 200


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most so many points, the largest of each stretch."""
    step = max(len(points) // _POINTS, 1)
    return [max(points[k : k + step], key=lambda point: point[1]) for k in range(0, len(points), step)]


def _held(best: Tried, rank: int) -> tuple[Held, ...]:
    """What holds memory at the peak: gradients count as far as they exist by then."""
    work = best.candidate.work(rank, best.rows_of(rank))
    peak = max(work.events, key=lambda event: event.peak)
    fixed = {"parameters": work.parameters, "optimizer state": work.optimizer, "buffers": work.buffers}
    fixed["inputs"] = work.inputs
    fixed["runtime"] = best.candidate.cost(rank).runtime_bytes
    rest = peak.peak - sum(fixed.values()) + fixed["runtime"]
    if peak.phase in ("gradient", "optimizer"):
        fixed["gradients"] = min(work.gradients, rest)
        fixed["buffers of reductions and updates"] = rest - fixed["gradients"]
    else:
        fixed["activations and gradients"] = rest
    held = [Held(name, size) for name, size in fixed.items() if size > 0]
    return tuple(sorted(held, key=lambda one: -one.bytes))


def _links(best: Tried) -> tuple[LinkForecast, ...]:
    """Traffic inside each node, and out of each node."""
    candidate, cluster = best.candidate, best.candidate.cluster
    inside: dict[int, int] = dict.fromkeys(range(len(cluster.nodes)), 0)
    for rank in best.ranks:
        node = cluster.devices[candidate.device_of[rank]].node
        inside[node] += sum(e.bytes for e in candidate.work(rank, best.rows_of(rank)).events if e.collective)
    return tuple(
        LinkForecast(
            f"node {node.index}",
            node.link.bandwidth_bytes_per_s,
            inside[node.index],
            inside[node.index] / len(node.devices) / node.link.bandwidth_bytes_per_s,
        )
        for node in cluster.nodes
    )


def _stage(study: Study, best: Tried, subject: Subject) -> StageForecast:
    flops = sum(
        event.flops
        for rank in best.ranks
        for event in best.candidate.work(rank, best.rows_of(rank)).events
        if event.phase == "forward"
    )
    return StageForecast(0, best.ranks, ("",), subject.parameters, float(flops))


def _breakdown(best: Tried, rank: int) -> Breakdown:
    track = best.played.tracks[rank]
    idle = best.step_s - track.busy_s - track.bridge_s - track.gradient_s
    return Breakdown(track.busy_s, max(idle, 0.0), track.bridge_s, track.gradient_s, track.gradient_s)


def _alternative(tried: Tried) -> Alternative:
    rank = tried.tightest
    return Alternative(
        strategy=tried.strategy,
        step_time_s=tried.step_s,
        verdict=tried.verdict,
        tightest=rank,
        peak_memory_bytes=tried.peak(rank),
        memory_capacity_bytes=tried.capacity(rank),
        missing_bytes=tried.missing,
        flags=tried.flags,
    )


def subject_of(
    name: str, model: nn.Module, study: Study, cluster: ClusterSpec, options: Options, sequence: int | None
) -> Subject:
    """What was asked, for the head of the reports."""
    sizes: Mapping[int, int] = {id(p): p.numel() for p in model.parameters()}
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    groups: dict[tuple[str, int], int] = {}
    for device in cluster.devices:
        groups[device.type, device.memory_bytes] = groups.get((device.type, device.memory_bytes), 0) + 1
    return Subject(
        model=name,
        parameters=sum(sizes.values()),
        trainable=sum(trained.values()),
        optimizer=options.optimizer,
        precision=options.precision or _precision(model),
        rows=study.rows,
        tokens=sequence,
        cluster=str(cluster),
        nodes=len(cluster.nodes),
        devices=tuple((count, kind, memory) for (kind, memory), count in groups.items()),
        link=str(cluster.inter or cluster.nodes[0].link),
        figures=cluster.figures,
    )


def _precision(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.is_floating_point}
    return ", ".join(sorted(dtypes)) or "float32"
